"""Sizes of experts by the form that the config chooses (section `expert`), without torch."""

from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

from moetrain.config.build import NoSuchPart, declared
from moetrain.errors import ConfigError
from moetrain.shapes import Shapes, shapes_of


class ExpertSizes(NamedTuple):
    """Numbers of one expert.

    Attributes:
        numbers: its parameters.
        in_matrices: those of its matrices, each of which a row is multiplied with.
        kept: numbers that backward keeps of one row.
    """

    numbers: int
    in_matrices: int
    kept: int


def expert_sizes(expert: Mapping[str, Any], dim: int, expert_dim: int) -> ExpertSizes:
    """Count by SHAPES and KEPT of the form (moe/expert_form.py); zeros for a part that is refused elsewhere.

    Args:
        expert: section `expert` of the config.
        dim: model width D.
        expert_dim: expert width F.

    Raises:
        ConfigError: SHAPES or KEPT cannot be read.
    """
    shapes, widths = _declared_shapes(expert, dim, expert_dim)
    return ExpertSizes(sum(map(prod, shapes.values())),
                       sum(prod(shape) for shape in shapes.values() if len(shape) > 1), sum(widths))


def expert_shapes(expert: Mapping[str, Any], dim: int, expert_dim: int) -> dict[str, int]:
    """Count the numbers of each parameter of an expert, by name. Arguments as of `expert_sizes`."""
    shapes, _ = _declared_shapes(expert, dim, expert_dim)
    return {name: prod(shape) for name, shape in shapes.items()}


def _declared_shapes(expert: Mapping[str, Any], dim: int, expert_dim: int) -> tuple[Shapes, tuple[int, ...]]:
    """Shapes of the parameters, and widths that backward keeps; none of a part that is refused elsewhere."""
    target = str(expert.get("_target_", ""))
    try:
        written, kept = (declared(target, "expert", name) for name in ("SHAPES", "KEPT"))
        shapes = shapes_of({**written, "(kept)": kept}, D=dim, F=expert_dim)
    except NoSuchPart:
        return {}, ()
    except ValueError as error:
        raise ConfigError(
            217, f"the shapes of {target} cannot be read", where="SHAPES and KEPT of the class",
            why=str(error),
            next='SHAPES = {"up": ("F", "D"), "down": ("D", "F")}, by D (model.dim) and F (model.expert_dim)'
        ) from error
    widths = shapes.pop("(kept)")
    return shapes, widths
