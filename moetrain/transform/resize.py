"""Experts of a run that stay, go or are added: a checkpoint of other sizes, with which training goes on.

    for every bank      expert j of the new run is expert keep[j] of the old one; `add` new ones follow
    experts             parameters and optimizer moments of those that stay, whole
    routers             the rows of `Router.choice_tensors`, in parameters, moments and buffers alike; rows of
                        choices that are no experts stay behind those of experts
    all else            unchanged: dense parameters, their moments, step, tokens, order of the data

New experts and their rows start as the model's modules declare (ops/start.py), with random numbers of their
own, and moments of 0. Counts and loads of the last steps (`prior.`, `plan.`) are left out: a run makes them
anew, as on another mesh.

ModuleFormer (Shen et al. 2023, 2306.04640) expands a model by experts for new data, and prunes those that a
target set uses least; `most_used` ranks them. It freezes the old experts while new ones learn. Here the
experts of a layer are stored together, and are trained or frozen together.

Shapes: C choices of a router.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from moetrain.checkpoint.compare import TensorKind, stored_tensors
from moetrain.checkpoint.records import split_expert
from moetrain.comm.mesh import lone_mesh
from moetrain.config.checks import check
from moetrain.config.layer_pattern import block_paths, mtp_layer, per_layer
from moetrain.config.parallel_schema import ParallelConfig
from moetrain.config.schema import Config
from moetrain.errors import ConfigError, ConfigErrors
from moetrain.model.build import ConvertModel, attention_name, meta_model, router_name
from moetrain.model.initialization import declared_starts
from moetrain.model.transformer import Transformer
from moetrain.ops.start import Place
from moetrain.parallel.state_shards import DTYPES, StateShard, experts_path, weights
from moetrain.transform.frame import Rule, transform
from moetrain.transform.reader import WeightsReader, open_weights
from moetrain.transform.writer import Training

# Ids of experts or a number of them; for all banks, or by the name of a bank.
Keep = int | Sequence[int] | Mapping[str, int | Sequence[int]] | None
# Tokens that chose each expert [E], by the name of the router.
Usage = Mapping[str, np.ndarray]


class Resizing(NamedTuple):
    """What becomes of the experts of a bank."""

    keep: tuple[int, ...]      # ids of those that stay, in their new order
    add: int                   # new ones after them

    @property
    def num_experts(self) -> int:
        return len(self.keep) + self.add


def resize_experts(source: str | Path, directory: str | Path, *, keep: Keep = None,
                   add: int | Mapping[str, int] = 0, usage: Usage | None = None,
                   router: Mapping[str, Any] | None = None,
                   convert_model: ConvertModel | None = None) -> Path:
    """Write a run with other experts, which goes on at the step of the source: `moetrain train <name>`.

    Args:
        source: name or directory of a run, of which the newest checkpoint is read, or one of a checkpoint.
        directory: directory of the new run, which holds none yet.
        keep: ids of the experts that stay, in their new order, or a number: so many of the most used; for all
            banks, or by the name of a bank (`layers.0.moe`), whose others stay as they are. None keeps all.
        add: number of new experts; for all banks, or by name.
        usage: tokens that chose each expert, [E] by the name of the router, for a number in `keep`.
        router: arguments of the router that change with the number of experts, such as num_groups.
        convert_model: that of the source's model, if it has one.

    Returns:
        Directory of the new run's checkpoint.

    Raises:
        ConfigError: no such experts or banks; no usage for a number; sizes that the config's router or top_k
            does not allow; a router that does not say which of its tensors have a row for each choice.
    """
    directory = Path(directory)
    with open_weights(source) as reader:
        old = _meta(reader.config, reader.vocab_size, convert_model)
        resizings = _resizings(old, keep, add, usage or {})
        config = replace(reader.config, router={**reader.config.router, **(router or {})})
        config = _named(_resized_config(config, resizings), directory)
        new = _meta(config, reader.vocab_size, convert_model)
        resized = _Resized(reader, config, old, new, resizings)
        rule = Rule("resize", {"experts": {name: part._asdict() for name, part in resizings.items()}},
                    expected="not preserving", seed=config.run.seed)
        return transform(directory, rule, [reader], config, resized.tensors(), training=resized.training(),
                         convert_model=convert_model).checkpoint


def most_used(choices_E: np.ndarray, number: int) -> tuple[int, ...]:
    """Ids of the experts that were chosen most often, ascending; the lower id first where they tie.

    Args:
        choices_E: [E], tokens that chose each expert.
        number: of experts.
    """
    return tuple(sorted(np.argsort(-choices_E, kind="stable")[:number].tolist()))


def _meta(config: Config, vocab_size: int, convert_model: ConvertModel | None) -> Transformer:
    alone = replace(config, parallel=ParallelConfig())
    return meta_model(alone, vocab_size, lone_mesh(torch.device("cpu")), convert_model)


def _named(config: Config, directory: Path) -> Config:
    """Give a config the name or the directory of its run."""
    below_runs = directory.parent == Path("runs")
    return replace(config, run=replace(config.run, name=directory.name,
                                       dir=None if below_runs else str(directory.absolute())))


def _resizings(model: Transformer, keep: Keep, add: int | Mapping[str, int],
               usage: Usage) -> dict[str, Resizing]:
    """Complete and check what is asked for, by the name of every bank."""
    feeds = model.feeds
    banks = {name: experts.dispatcher.placement.num_experts for name, experts in model.banks.items()}
    unknown = [name for part in (keep, add) if isinstance(part, Mapping)
               for name in part if name not in banks]
    if unknown:
        raise ConfigError(277, f"there is no bank of experts {unknown[0]}", where="keep, add",
                          why=f"the model's are {', '.join(banks) or 'none'}", next="name one of these")
    found = {}
    for name, experts in banks.items():
        kept = keep.get(name) if isinstance(keep, Mapping) else keep
        if isinstance(kept, int):
            kept = _most_used_of(name, feeds[name], kept, experts, usage)
        found[name] = Resizing(tuple(range(experts)) if kept is None else tuple(kept),
                               add.get(name, 0) if isinstance(add, Mapping) else add)
        _check(name, found[name], experts)
    if all(part == Resizing(tuple(range(banks[name])), 0) for name, part in found.items()):
        raise _impossible("every expert stays, and none is added", "the new run would equal the source",
                          "keep=[0,1,2], or add=2")
    return found


def _most_used_of(bank: str, routers: Sequence[str], number: int, experts: int,
                  usage: Usage) -> tuple[int, ...]:
    """Choose the most used experts of a bank, by the choices of all its routers."""
    missing = [name for name in routers if name not in usage]
    if missing:
        some = ",".join(map(str, range(max(1, min(number, experts)))))
        raise ConfigError(279, f"it is not known how often {missing[0]} uses its experts", where="keep",
                          why="a number keeps the most used, by the choices of an evaluation on two domains "
                              "or more",
                          next=f"keep=[{some}], with the ids that shall stay")
    if not 0 <= number <= experts:
        raise _impossible(f"{bank} cannot keep {number} experts", f"it has {experts}",
                          f"keep={experts} or less")
    return most_used(np.sum([np.asarray(usage[name])[:experts] for name in routers], axis=0), number)


def _check(bank: str, part: Resizing, experts: int) -> None:
    """Raise ConfigError where a bank of so many experts cannot be resized so."""
    why = f"it has the experts 0 to {experts - 1}; each stays once or goes, and one at least is left"
    odd = [expert for expert in part.keep if not 0 <= expert < experts or part.keep.count(expert) > 1]
    if odd:
        there = sorted({expert for expert in part.keep if 0 <= expert < experts})
        raise _impossible(f"{bank} cannot keep expert {odd[0]}", why,
                          f"keep=[{','.join(map(str, there or range(experts)))}]")
    if part.add < 0 or not part.num_experts:
        raise _impossible(f"{bank} would keep {len(part.keep)} experts and get {part.add} new ones", why,
                          "keep=[0] or more, and add=0 or more")


def _impossible(what: str, why: str, instead: str) -> ConfigError:
    return ConfigError(276, what, where="keep, add", why=why, next=instead)


def _resized_config(config: Config, resizings: Mapping[str, Resizing]) -> Config:
    """Give a config the new numbers of experts, and refuse sizes that its rules do not allow."""
    sizes = config.model
    now = {path: resizings[name].num_experts if (name := router_name(path)) in resizings
           else per_layer(sizes.num_experts, layer) for path, layer in block_paths(sizes)}
    counts = [now[f"layers.{layer}"] for layer in range(sizes.num_layers)]
    if ahead := {path for path, layer in block_paths(sizes) if now[path] != counts[layer]}:
        raise _impossible(f"{router_name(min(ahead))} would have {now[min(ahead)]} experts, and layer "
                          f"{mtp_layer(sizes)} {counts[mtp_layer(sizes)]}",
                          "a module of multi-token prediction has the sizes of the last layer with experts",
                          "as many of keep and add for both")
    attention = {resizings[name].num_experts for path, _ in block_paths(sizes)
                 if (name := attention_name(path)) in resizings}
    if len(attention) > 1:
        raise _impossible("layers would have different numbers of attention experts",
                          "model.num_attention_experts is one number for all layers",
                          "as many of keep and add for every attention bank")
    alike = {count for path, count in now.items() if router_name(path) in resizings}
    one_number = isinstance(sizes.num_experts, int) and len(alike) == 1
    sizes = replace(sizes, num_experts=alike.pop() if one_number else counts,
                    num_attention_experts=attention.pop() if attention else sizes.num_attention_experts)
    config = replace(config, model=sizes)
    alone = replace(config, parallel=ParallelConfig(), run=replace(config.run, nproc=1))
    if errors := check(alone, 1, trains=False):
        raise ConfigErrors(errors)
    return config


class _Origin(NamedTuple):
    """Where a tensor of the new run comes from. Names are those of the model, without a prefix.

    Attributes:
        name: the old tensor; None for one of a new expert.
        like: an old tensor with the same moments.
        rows: old row of each new row, None for a new one; None where the tensor stays whole.
    """

    name: str | None
    like: str
    rows: list[int | None] | None = None


class _Resized:
    """Tensors of the new run, made of the old one's.

    Args:
        source: checkpoint of the old run.
        config: of the new run.
        old: the old model, on the meta device.
        new: the new one.
        resizings: by bank.
    """

    def __init__(self, source: WeightsReader, config: Config, old: Transformer, new: Transformer,
                 resizings: Mapping[str, Resizing]) -> None:
        self.source, self.config, self.resizings = source, config, resizings
        self.banks = {experts_path(f"{path}.bank"): resizings[name]
                      for name, path in _paths(new, new.banks).items()}
        self.rows = _choice_rows(old, new, resizings)
        self.starts = declared_starts(new)
        self.expected = {shard.name: shard for shard in weights(new)}
        self._refuse_undeclared(old)
        self.moments: dict[str, dict[str, TensorKind]] = {}      # by tensor, then by moment
        for name, kind in stored_tensors(source.manifest, ("optim.",)).items():
            tensor, _, moment = name.removeprefix("optim.").rpartition(".")
            self.moments.setdefault(tensor, {})[moment] = kind

    def training(self) -> Training:
        """How far training has come, and its moments."""
        moments = {f"optim.{name}.{moment}": TensorKind(kind.dtype, tuple(shard.shape))
                   for name, shard in self._each()
                   for moment, kind in self.moments.get(self._origin(name).like, {}).items()}
        values = self.source.manifest.values
        return Training(step=values["step"], tokens=values["tokens"], moments=moments)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over names and values: weights, each followed by its moments."""
        for name, shard in self._each():
            origin, kind = self._origin(name), shard.name.partition(".")[0]
            yield shard.name, self._values(kind, origin, "", lambda: self._start(shard))  # noqa: B023 (used at once)
            for moment, stored in self.moments.get(origin.like, {}).items():
                zeros = lambda: torch.zeros(shard.shape, dtype=DTYPES[stored.dtype])  # noqa: E731, B023
                yield f"optim.{name}.{moment}", self._values("optim", origin, f".{moment}", zeros)

    def _each(self) -> Iterator[tuple[str, StateShard]]:
        yield from ((name.partition(".")[2], shard) for name, shard in self.expected.items())

    def _origin(self, name: str) -> _Origin:
        pattern, expert = split_expert(name) or ("", -1)
        part = self.banks.get(pattern.partition(".*.")[0])
        if part is None:
            return _Origin(name, name, self.rows.get(name))
        first = pattern.replace("*", "0")
        if expert >= len(part.keep):
            return _Origin(None, first)
        return _Origin(pattern.replace("*", str(part.keep[expert])), first)

    def _values(self, prefix: str, origin: _Origin, suffix: str, start: Callable[[], Tensor]) -> Tensor:
        if origin.name is None:
            return start()
        old = self.source[f"{prefix}.{origin.name}{suffix}"]
        if origin.rows is None:
            return old
        # Start values may come from a file with a row for each choice, so they are not read without need.
        new = start() if None in origin.rows else old.new_empty(len(origin.rows), *old.shape[1:])
        stay = [row for row, before in enumerate(origin.rows) if before is not None]
        new[stay] = old[[before for before in origin.rows if before is not None]].to(new.dtype)
        return new

    def _start(self, shard: StateShard) -> Tensor:
        """Start values of a whole tensor. Their numbers are those of no other tensor and of no other step."""
        rule, sizes = self.starts[shard.stored], self.config.model
        step = self.source.manifest.values["step"]
        key = f"{rule.key(shard.name.partition('.')[2])} resized at step {step}"
        values = torch.empty(shard.shape, dtype=shard.rows.dtype)
        rule.start.fill(values, Place(key, tuple(shard.shape), 0, self.config.run.seed, sizes.init_std,
                                      sizes.num_layers))
        return values

    def _refuse_undeclared(self, old: Transformer) -> None:
        """Raise ConfigError where a tensor has another shape now, and no router declares its rows."""
        for name, router in old.routers.items():
            if router.holds_ids or getattr(router, "num_groups", 1) > 1:
                raise ConfigError(
                    287, f"{name} cannot be resized: {type(router).__name__} knows experts by their ids",
                    where="router._target_",
                    why="they get other ids, and other groups, where some go or come",
                    next="a run of another router")
        before = {shard.name: tuple(shard.shape) for shard in weights(old)}
        for name, shard in self._each():
            was, now = before.get(shard.name), tuple(shard.shape)
            if self._origin(name).name == name and was != now and (
                    name not in self.rows or was is None or len(self.rows[name]) != now[0]):
                raise ConfigError(
                    278, f"{name} cannot be resized: its shape is {list(was or ())} with the old number of "
                         f"experts, and {list(now)} with the new one", where="keep, add",
                    why="no router declares that it has one row for each choice (Router.choice_tensors)",
                    next="name it there if it has; or fix its size by an argument of the router, as "
                         "router.proj_dim=4")


def _paths(model: Transformer, parts: Mapping[str, nn.Module]) -> dict[str, str]:
    """Path in the model of each part, by its name."""
    paths = {id(module): path for path, module in reversed(list(model.named_modules()))}
    return {name: paths[id(part)] for name, part in parts.items()}


def _choice_rows(old: Transformer, new: Transformer,
                 resizings: Mapping[str, Resizing]) -> dict[str, list[int | None]]:
    """Old row of each new row, by the name of every tensor with one row for each choice."""
    bank_of = {name: bank for bank, passes in new.feeds.items() for name in passes}
    found: dict[str, list[int | None]] = {}
    for name, path in _paths(new, new.routers).items():
        before, part = old.routers[name], resizings[bank_of[name]]
        rows = [*part.keep, *[None] * part.add, *range(before.num_experts, before.num_choices)]
        for tensor in before.choice_tensors:
            # A router that serves several banks has one set of rows.
            if found.setdefault(f"{path}.{tensor}", rows) != rows:
                raise _impossible(f"{name} and another bank share a router",
                                  "the experts of banks that one router serves stay or go together",
                                  "the same keep and add for both")
    return found
