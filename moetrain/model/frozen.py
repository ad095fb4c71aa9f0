"""Frozen parameters: which ones `train.frozen` names, and what has to follow where any are frozen.

A parameter is frozen if it does not require a gradient, whoever has decided that: its module, `convert_model`
or `train.frozen`. Nothing else records it. The optimizer, the sums and the norm of gradients, and the
gradients of expert copies ask the parameter; so this happens on the meta device, before any of them is built.
Frozen parameters are initialized, sharded, copied, moved and saved like the others.
"""

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from shlex import quote

import torch
from torch import nn

from moetrain.config.suggest import distance
from moetrain.errors import ConfigError
from moetrain.moe.bank import ExpertBank
from moetrain.moe.experts import RoutedExperts
from moetrain.parallel.state_shards import experts_path


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze the parameters that patterns name, and the slices of experts whose matrices are frozen.

    Args:
        model: the whole model or one rank's part of it; every rank freezes the same.
        patterns: glob patterns of names as in checkpoints; `*` also stands for dots.

    Raises:
        ConfigError: a pattern names no parameter, or some experts of a layer alone.
    """
    named = [(parameter, names) for parameter, names in _names(model)]
    everything = [name for _, names in named for name in names]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in everything):
            raise _names_nothing(pattern, everything)
    for parameter, names in named:
        chosen = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
        if chosen and len(chosen) < len(names):
            raise _some_experts(chosen, next(name for name in names if name not in chosen), patterns)
        if chosen:
            parameter.requires_grad_(False)
    for bank in model.modules():
        if isinstance(bank, ExpertBank) and bank.cut is not None:
            for name, slices in zip(bank.names, bank.slices):
                whole, sliced = bank.stacked(name), bank.stacked(slices)
                sliced.requires_grad_(whole.requires_grad)
                if not whole.requires_grad:              # a frozen matrix may have a dtype of its own
                    sliced.data = sliced.data.to(whole.dtype)


def refuse_nothing_to_train(model: nn.Module, patterns: Sequence[str]) -> None:
    """Raise ConfigError if every parameter is frozen."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            229, "every parameter of the model is frozen",
            where="train.frozen" if patterns else "convert_model",
            why="no parameter requires a gradient, so there is nothing to train",
            next="leave out what shall be trained; moetrain eval evaluates a run without training it")


def to_storage(model: nn.Module, dtype: torch.dtype) -> None:
    """Give parameters and buffers the dtype in which they are stored.

    Frozen parameters of a dtype of their own, other than float32, keep it: a base in bfloat16 beside trained
    parameters in float32.
    """
    own = {name: parameter.dtype for name, parameter in model.named_parameters()
           if not parameter.requires_grad and parameter.dtype != torch.float32}
    model.to(dtype)
    for name, kept in own.items():
        parameter = model.get_parameter(name)
        parameter.data = parameter.data.to(kept)


def _names(model: nn.Module) -> Iterator[tuple[nn.Parameter, list[str]]]:
    """Iterate over parameters with the names of the tensors that they store, on all ranks together.

    Slices of experts are left out. They follow the matrices that they are cut from.
    """
    banks: set[str] = set()
    for path, module in model.named_modules():
        if isinstance(module, RoutedExperts):
            banks.add(f"{path}.bank")
            for name in module.bank.names:
                yield module.bank.stacked(name), [
                    f"{experts_path(f'{path}.bank')}.{expert}.{name}"
                    for expert in range(module.dispatcher.placement.num_experts)]
        if path not in banks:
            for name, parameter in module.named_parameters(path, recurse=False):
                yield parameter, [name]


def _names_nothing(pattern: str, names: Sequence[str]) -> ConfigError:
    """Error of a pattern without a match, with the nearest names; layers and experts are written as `*`."""
    kinds = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
    typed = re.sub(r"\.\d+\.", ".*.", pattern)
    nearest = sorted(kinds, key=lambda kind: distance(typed, kind))[:3]
    return ConfigError(
        227, f"train.frozen={pattern} names no parameter", where="train.frozen",
        why=f"the nearest names in a checkpoint of this model are {', '.join(nearest)}",
        next=quote(f"train.frozen=[{nearest[0]}]"))


def _some_experts(chosen: Sequence[str], trained: str, patterns: Sequence[str]) -> ConfigError:
    """Error of patterns that name some experts of a layer and not the others."""
    path, _, matrix = chosen[0].rsplit(".", 2)
    return ConfigError(
        228, f"train.frozen names {chosen[0]} and not {trained}", where="train.frozen",
        why="the experts of a layer are stored together: a matrix of theirs is frozen for all or for none",
        next=quote(f"train.frozen=[{path}.*.{matrix}]"))
