"""Sizes of routers by the class that the config chooses (section `router`), without torch."""

from collections.abc import Mapping
from dataclasses import MISSING
from math import prod
from typing import Any, NamedTuple

from moetrain.config.architecture import attention_top_k, num_attention_experts
from moetrain.config.build import NoSuchPart, arguments, declared
from moetrain.config.formula import evaluate
from moetrain.config.layer_pattern import per_layer, sparse_layers
from moetrain.config.schema import ModelConfig
from moetrain.errors import ConfigError
from moetrain.shapes import Shapes


class RouterSizes(NamedTuple):
    """Numbers of the router of a layer.

    Attributes:
        shapes: shapes of its parameters, by name.
        shared: those of modules that the routers of all layers have in common, by name below `tied`.
        mean_experts: experts that a token takes in the mean, as far as it is known before training.
        slots: K, the most choices of a token.
    """

    shapes: Shapes
    shared: Shapes
    mean_experts: float
    slots: int

    @property
    def numbers(self) -> int:
        """Numbers of the parameters of one layer's own."""
        return sum(map(prod, self.shapes.values()))

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """Shapes of the matrices that a token is multiplied with."""
        return [(shape[0], shape[1]) for shape in (*self.shapes.values(), *self.shared.values())
                if len(shape) == 2]


def router_sizes(router: Mapping[str, Any], *, dim: int, num_experts: int, top_k: int) -> RouterSizes:
    """Count by SHAPES, SHARED_SHAPES, MEAN_EXPERTS and SLOTS of the class (routers/base.py).

    A part that is refused elsewhere counts as no parameters and top_k experts.

    Args:
        router: section `router` of the config.
        dim: model width D.
        num_experts: E.
        top_k: K.

    Raises:
        ConfigError: one of the formulas has no value.
    """
    target = str(router.get("_target_", ""))
    try:
        accepted = arguments(target, "router")
        written = {name: declared(target, "router", name)
                   for name in ("SHAPES", "SHARED_SHAPES", "MEAN_EXPERTS", "SLOTS")}
    except NoSuchPart:
        return RouterSizes({}, {}, top_k, top_k)
    defaults = {name: key.default for name, key in accepted.items() if key.default is not MISSING}
    names = {**defaults, **router, "D": dim, "E": num_experts, "K": top_k}
    try:
        shapes, shared = (_shapes(written[name] or {}, names) for name in ("SHAPES", "SHARED_SHAPES"))
        mean, slots = (evaluate(written[name], names) for name in ("MEAN_EXPERTS", "SLOTS"))
        return RouterSizes(shapes, shared, float(mean), int(slots))
    except (ValueError, TypeError) as error:
        raise ConfigError(
            302, f"the sizes of {target} cannot be computed",
            where="SHAPES, MEAN_EXPERTS and SLOTS of the class", why=str(error),
            next='SHAPES = {"weight": ("E", "D")}, by D (model.dim), E (model.num_experts), K (model.top_k) '
                 "and arguments of the class") from error


def layer_router(router: Mapping[str, Any], sizes: ModelConfig, layer: int) -> RouterSizes:
    """Count the router of a layer with experts; of a chain, one of its routers.

    Args:
        router: section `router` of the config.
        sizes: section `model`.
        layer: number of the layer.
    """
    return router_sizes(router, dim=sizes.dim, num_experts=per_layer(sizes.num_experts, layer),
                        top_k=per_layer(sizes.top_k, layer))


def attention_router(router: Mapping[str, Any], sizes: ModelConfig) -> RouterSizes:
    """Count the router of the attention experts of a layer. Arguments as above."""
    return router_sizes(router, dim=sizes.dim, num_experts=num_attention_experts(sizes),
                        top_k=attention_top_k(sizes))


def shared_by_routers(router: Mapping[str, Any], sizes: ModelConfig) -> Shapes:
    """Shapes of what all routers of a model have in common, by name; none without routers."""
    if sizes.attention in ("experts", "sliced"):
        return attention_router(router, sizes).shared
    sparse = sparse_layers(sizes)
    return layer_router(router, sizes, sparse[0]).shared if sparse else {}


def _shapes(written: Mapping[str, tuple[str | int, ...]], names: Mapping[str, Any]) -> Shapes:
    """Shapes by name, without those of no numbers, which the router does not have."""
    found = {name: tuple(int(evaluate(width, names)) for width in widths) for name, widths in written.items()}
    return {name: shape for name, shape in found.items() if prod(shape)}
