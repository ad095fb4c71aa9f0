"""Start values of a model: every module declares those of its tensors (ops/start.py), here they are applied.

    declared_starts    the rule of each tensor; refuses a tensor without one
    initialize         fill what this rank holds of a sharded model
    materialize        both, for one module on the host

A rule may stand in the module that owns a tensor or in any module around it, under the name that the tensor
has from there. The outermost one decides, so that a module can start its parts in another way.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moetrain.errors import ConfigError
from moetrain.ops.start import Place, Start
from moetrain.parallel.state_shards import state_shards


class Declared(NamedTuple):
    """Rule of a tensor, and the name by which a module declares it."""

    start: Start
    relative: str

    def key(self, name: str) -> str:
        """Name that keys the random numbers of the logical tensor of this name."""
        if self.start.drawn_as is None:
            return name
        assert name.endswith(self.relative), (name, self.relative)
        return (name.removesuffix(self.relative) + self.start.drawn_as).removesuffix(".")


def declared_starts(model: nn.Module) -> dict[str, Declared]:
    """Collect the rule of every parameter and buffer, by its name in the model.

    Raises ConfigError for a tensor that no module around it names, for a name without a tensor, and for a
    tensor that is neither parameter nor buffer: building on the meta device loses its values.

    Args:
        model: a model, or any module; usually on the meta device.
    """
    tensors = dict(_tensors(model))
    found: dict[str, Declared] = {}
    # From the outside to the inside; a shared module under each of its names.
    for path, module in model.named_modules(remove_duplicate=False):
        _refuse_loose_tensors(module)
        for relative, start in _declared_by(module).items():
            name = _join(path, relative)
            if name not in tensors:
                raise ConfigError(
                    206, f"{type(module).__name__} gives a start value to {relative}, and has no such tensor",
                    where=_source_of(module),
                    why="starts() names parameters and buffers of the module, and of those inside it",
                    next=f"one of {', '.join(sorted(dict(_tensors(module)))) or 'none'}")
            found.setdefault(name, Declared(start, relative))
    for name in tensors:
        if name not in found:
            raise _without_start(model, name)
    return found


@torch.no_grad()
def initialize(model: nn.Module, starts: Mapping[str, Declared], *, seed: int, std: float,
               num_layers: int) -> None:
    """Initialize this rank's parameters and buffers in place.

    Args:
        model: this rank's part of the model, in memory.
        starts: rule of every tensor, from `declared_starts`.
        seed: seed of the run.
        std: standard deviation of matrices, for rules that leave it to the model.
        num_layers: blocks of the model.
    """
    for name, buffer in model.named_buffers():
        rule = starts[name]
        rule.start.fill(buffer, Place(rule.key(name), tuple(buffer.shape), 0, seed, std, num_layers))
    for shard in state_shards(model):
        rule = starts[shard.stored]
        place = Place(rule.key(shard.name), shard.shape, shard.begin, seed, std, num_layers)
        rule.start.fill(shard.rows, place)


def materialize(module: nn.Module, *, seed: int, std: float, num_layers: int) -> None:
    """Give a module by itself memory on the host, in float64, and its start values. Arguments as above.

    For parts that are tried out without a run. The module is usually on the meta device.
    """
    starts = declared_starts(module)
    module.to_empty(device="cpu").double()
    initialize(module, starts, seed=seed, std=std, num_layers=num_layers)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Iterate over parameters and buffers, persistent or not, by each name that they have."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _declared_by(module: nn.Module) -> dict[str, Start]:
    return module.starts() if hasattr(module, "starts") else {}


def _refuse_loose_tensors(module: nn.Module) -> None:
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            raise ConfigError(
                207, f"{type(module).__name__}.{name} is a tensor that is neither parameter nor buffer",
                where=_source_of(module),
                why="the model is built without memory, so values that a constructor gives are lost",
                next=f'self.register_buffer("{name}", torch.empty(...), persistent=False), '
                     "and its values in starts()")


def _without_start(model: nn.Module, name: str) -> ConfigError:
    """Make the error of a tensor without a rule: it names the user's own module around it, if any."""
    around = list(_around(model, name))
    own = [(owner, relative) for owner, relative in around
           if type(owner).__module__.partition(".")[0] not in ("torch", "moetrain")]
    owner, relative = (own or around)[0]
    cls, before = type(owner).__name__, "**super().starts(), " if hasattr(owner, "starts") else ""
    return ConfigError(
        205, f"{name} has no start value", where=_source_of(owner),
        why="the model is built without memory, so a value that the constructor gives is lost",
        next=f"in {cls if own else f'a subclass of {cls}'}: def starts(self): return "
             f'{{{before}"{relative}": constant(<value>)}}; moetrain.ops.start has normal and values, too')


def _around(model: nn.Module, name: str) -> Iterator[tuple[object, str]]:
    """Yield who may declare the start of a tensor, from the inside out, and its name there."""
    path, _, relative = name.rpartition(".")
    while True:
        module = model.get_submodule(path)
        yield getattr(module, "form", module), relative      # a bank of experts asks their form
        if not path:
            return
        path, _, inner = path.rpartition(".")
        relative = f"{inner}.{relative}"


def _source_of(owner: object) -> str:
    return f"{type(owner).__module__}.{type(owner).__qualname__}"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
