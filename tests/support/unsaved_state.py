"""Find what steps change and a checkpoint would lose."""

import pathlib
import random
import re
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from moetrain.parallel.state_shards import local
from moetrain.train.state import REBUILT, Run
from moetrain.train.step import train_step

ATOMS = (int, float, bool, str, bytes, type(None))
CLOSED = (torch.device, torch.dtype, torch.Size, type, pathlib.Path, types.ModuleType)


def walk(thing: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """(path, tensor, array, generator or number) of everything that an object holds, however deep."""
    if isinstance(thing, ATOMS):
        yield path, thing
        return
    if isinstance(thing, CLOSED) or callable(thing) and not isinstance(thing, nn.Module) or id(thing) in seen:
        return
    if not getattr(thing, "__dataclass_params__", None) or not thing.__dataclass_params__.frozen:
        seen.add(id(thing))                              # a frozen record may hang from several places
    if isinstance(thing, torch.Tensor):
        yield path, thing
        if thing.is_leaf and thing.grad is not None:
            yield f"{path}.grad", thing.grad
    elif isinstance(thing, (np.ndarray, torch.Generator, np.random.Generator, np.random.BitGenerator,
                            random.Random)):
        yield path, thing
    elif isinstance(thing, dict):
        for number, (key, value) in enumerate(thing.items()):
            name = key if isinstance(key, ATOMS) else number
            yield from walk(value, f"{path}.{name}", seen)
    elif isinstance(thing, (list, tuple, set, frozenset)):
        for number, value in enumerate(thing):
            yield from walk(value, f"{path}.{number}", seen)
    elif hasattr(thing, "__dict__"):
        for name, value in vars(thing).items():
            yield from walk(value, f"{path}.{name}", seen)


def frozen(value: Any) -> Any:
    """Something that compares equal as long as the value stays the same."""
    match value:
        case torch.Tensor():
            value = local(value.detach()).cpu().contiguous()
            return value.view(torch.uint8).numpy().tobytes() if value.ndim else value.item()
        case np.ndarray():
            return value.tobytes()
        case torch.Generator():
            return value.get_state().numpy().tobytes()
        case np.random.Generator():
            return repr(value.bit_generator.state)
        case np.random.BitGenerator():
            return repr(value.state)
        case random.Random():
            return repr(value.getstate())
    return value


def unsaved(run: Run) -> list[str]:
    """Paths of what two further steps change and a checkpoint would lose."""
    train_step(run, 1)
    before = {path: frozen(value) for path, value in walk(run, "run", set())}
    train_step(run, 2)
    train_step(run, 3)
    saved = {shard.rows.untyped_storage().data_ptr() for shard in run.state.state_shards()}
    counters = {f"run.state.{name}" for name in run.state.values()}
    lost = []
    for path, value in walk(run, "run", set()):
        made_anew = any(re.search(rebuilt, path) for rebuilt in REBUILT)
        if before.get(path) == frozen(value) or path in counters or made_anew:
            continue
        if not (isinstance(value, torch.Tensor) and local(value).untyped_storage().data_ptr() in saved):
            lost.append(path)
    return lost
