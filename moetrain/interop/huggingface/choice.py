"""Choice of the public family that holds a model exactly."""

from moetrain.config.schema import Config
from moetrain.config.suggest import nearest
from moetrain.errors import CONTINUED, ConfigError
from moetrain.interop.huggingface.families import FAMILIES
from moetrain.interop.huggingface.families.base import Family


def choose_family(config: Config, asked: str | None = None, origin: str | None = None) -> Family:
    """Choose the family whose models compute what the model of a config computes.

    Args:
        config: config of the model.
        asked: the family that the command names; None takes the first that holds the model.
        origin: the family that the model was imported from, which is tried before the others.

    Returns:
        The family.

    Raises:
        ConfigError: there is no such family, or none holds the model. The error names each option that stands
            in the way of the family that was asked for, or of the one with the fewest.
    """
    if asked is not None:
        _known(asked)
    names = [asked] if asked is not None else sorted(FAMILIES, key=lambda name: name != origin)
    found = {name: _of_one_kind(FAMILIES[name].refusals(config)) for name in names}
    exact = next((name for name, refused in found.items() if not refused), None)
    if exact is not None:
        return FAMILIES[exact]
    near = min(found, key=lambda name: len(found[name]))
    others = "" if asked is not None else f"; none of the {len(names)} families does"
    raise ConfigError(
        316, f"{near} does not hold the model exactly{others}",
        where=", ".join(dict.fromkeys(key for key, _ in found[near])),
        why=CONTINUED.join(f"{key}: {why}" for key, why in found[near]),
        next="train with what the family has" if asked is None else
             "leave family= out, and the family that holds the model is chosen")


def _of_one_kind(refused: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Leave out the arguments of a part that is another one altogether."""
    other = tuple(key.removesuffix("_target_") for key, _ in refused if key.endswith("._target_"))
    return [(key, why) for key, why in refused if key.endswith("._target_") or not key.startswith(other)]


def _known(name: str) -> None:
    if name not in FAMILIES:
        near = nearest(name, FAMILIES) or list(FAMILIES)
        raise ConfigError(315, f"there is no family {name}", where="family",
                          why=f"the families are {', '.join(FAMILIES)}",
                          next=" or ".join(f"family={choice}" for choice in near))
