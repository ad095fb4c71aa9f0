"""What a command that evaluates or continues a trained run may change. Every key is of one of three kinds.

    fixed      the checkpoint holds what came of it, or training alone reads it: another value is refused
    changing   another value makes another model of the trained one: allowed, and said
    free       how the run is looked at: ranks, device, data, windows, sampling

A part declares which arguments of its constructor only say how its tensors start (`START_ARGUMENTS`, a
literal). They are fixed: the checkpoint's values are loaded over whatever they say.
"""

from collections.abc import Iterator
from dataclasses import MISSING, replace
from typing import Any, NamedTuple

from moetrain.config.build import NoSuchPart, arguments, declared
from moetrain.config.layer_pattern import is_sparse, per_layer
from moetrain.config.schema import Config
from moetrain.config.values import flatten, show
from moetrain.errors import ConfigError

# A trailing dot means the whole section.
FIXED = ("model.", "init.", "optim.", "balance.", "loss", "loss.", "language_loss.", "train.frozen",
         "denoising.", "run.seed", "run.steps")
CHANGING = ("model.top_k", "router.", "capacity.", "expert.", "train.seq_len", "data.mask_documents")
_PARTS = ("router", "capacity", "expert")


class Changed(NamedTuple):
    """A key that makes another model of the trained one."""

    key: str
    trained: Any
    now: Any

    def __str__(self) -> str:
        return (f"{self.key} was {show(self.trained)} in training and is {show(self.now)} now: this is not "
                "the model that was trained")


def is_fixed(key: str) -> bool:
    """Whether another value of a key than the trained one is refused."""
    return _among(key, FIXED) and not is_changing(key)


def is_changing(key: str) -> bool:
    """Whether another value of a key than the trained one makes another model."""
    return _among(key, CHANGING)


def changes(trained: Config, config: Config) -> tuple[Changed, ...]:
    """List the keys by which the model of a command differs from the one that was trained.

    Args:
        trained: the config that the run was trained with.
        config: the config of the command.
    """
    before, now = _with_defaults(trained), _with_defaults(config)
    idle = set(_start_arguments(config))
    return tuple(Changed(key, before.get(key), now.get(key)) for key in dict.fromkeys([*before, *now])
                 if is_changing(key) and key not in idle and before.get(key) != now.get(key))


def _with_defaults(config: Config) -> dict[str, Any]:
    """All keys, with the arguments of parts that the config leaves to the constructor."""
    values = flatten(config)
    for section in _PARTS:
        try:
            accepted = arguments(str(getattr(config, section).get("_target_", "")), section)
        except NoSuchPart:
            continue
        values = {f"{section}.{name}": key.default for name, key in accepted.items()
                  if key.default is not MISSING} | values
    return values


def refuse_starts(trained: Config, config: Config) -> list[ConfigError]:
    """List an error for each key that differs and only says how a tensor starts.

    Args:
        trained: the config that the run was trained with.
        config: the config of the command.
    """
    before, now = _with_defaults(trained), _with_defaults(config)
    return [ConfigError(
        212, f"{key}={show(now[key])} has no effect", where=key,
        why="it says how a tensor starts, and the checkpoint's values are loaded over that; the run was "
            f"trained with {show(before.get(key))}",
        next=f"leave {key} out") for key in _start_arguments(config) if before.get(key) != now.get(key)]


def _start_arguments(config: Config) -> Iterator[str]:
    """Yield the keys of the chosen parts that only say how tensors start."""
    for section in _PARTS:
        try:
            names = declared(str(getattr(config, section).get("_target_", "")), section, "START_ARGUMENTS")
        except NoSuchPart:
            continue
        yield from (f"{section}.{name}" for name in names or ())


def without_starts(config: Config) -> Config:
    """Give arguments that only say how tensors start their defaults: a file that they name may be gone.

    Args:
        config: the config of a command that loads the checkpoint's values over every start.
    """
    found = config
    for key in _start_arguments(config):
        section, _, name = key.partition(".")
        node = getattr(found, section)
        default = arguments(str(node["_target_"]), section)[name].default
        if default is not MISSING:
            changed: dict[str, Any] = {section: {**node, name: default}}
            found = replace(found, **changed)
    return found


def with_trained_widths(trained: Config, config: Config) -> Config:
    """Keep the `top_k` of dense layers, which are as wide as so many experts unless model.dense_dim is set.

    Args:
        trained: the config that the run was trained with.
        config: the config of the command, whose model differs in top_k alone.
    """
    own, model = trained.model, config.model
    dense = [layer for layer in range(own.num_layers) if not is_sparse(own, layer)]
    if not dense or own.dense_dim is not None or model.top_k == own.top_k:
        return config
    top_k = [per_layer((own if layer in dense else model).top_k, layer) for layer in range(own.num_layers)]
    return replace(config, model=replace(model, top_k=top_k))


def _among(key: str, keys: tuple[str, ...]) -> bool:
    return any(key == other or other.endswith(".") and key.startswith(other) for other in keys)
