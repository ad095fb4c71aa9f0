"""Kernels for the dispatch key CUDA: one fallback for every operator, and kernels of their own for a few."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tests.support.simulated_device.cuda import GENERATORS
from tests.support.simulated_device.guard import library
from tests.support.simulated_device.memory import alias, empty, to_device
from tests.support.simulated_device.waits import RECORD

_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
aten = torch.ops.aten
_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "addmv", "mv", "dot"}
_INTEGERS = {torch.int64, torch.int32, torch.int16}
_MIXES = {"where", "masked_fill", "masked_fill_", "index_put", "lerp", "addcmul", "addcdiv", "fill",
          "index_fill", "floor_divide", "floor_divide_"}
_TAKES_HOST_INDEX = {"index", "index_put_", "_index_put_impl_", "index_put"}
_WAITS = {"nonzero", "masked_select", "unique", "_unique2", "unique_dim", "unique_consecutive", "equal",
          "bincount", "nonzero_static"}
_OUT = {"out", "out0", "out1", "out2", "values", "indices", "total_weight"}


def tensors_of(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_of(value)


def _check_devices(op: Any, args: tuple, kwargs: dict) -> torch.device:
    """The device of all operands; RuntimeError, as from CUDA, where there are two."""
    name = op._schema.name.partition("::")[2]
    operands = list(tensors_of([*args, *kwargs.values()]))
    on_device = [tensor for tensor in operands if tensor.device.type == "cuda"]
    devices = {tensor.device for tensor in on_device}
    if not devices:
        where = kwargs.get("device")
        if where is not None and where.index is not None:
            return where
        return torch.device("cuda", library().simulated_device())
    pointwise = torch.Tag.pointwise in op.tags or name in _MIXES
    for tensor in operands:
        if tensor.device.type == "cuda":
            continue
        if tensor.dim() == 0 and (pointwise or name in _TAKES_HOST_INDEX):
            if not tensor.is_meta:
                continue
        if name in _TAKES_HOST_INDEX and tensor is not operands[0]:
            RECORD.add("index of the host", name)
            continue
        devices.add(tensor.device)
    if len(devices) > 1:
        raise RuntimeError("Expected all tensors to be on the same device, but found at least two devices, "
                           f"{' and '.join(sorted(map(str, devices)))}! (simulated: {op})")
    return devices.pop()


def _refuse(op: Any, args: tuple, kwargs: dict) -> None:
    name = op._schema.name.partition("::")[2]
    if name in _PRODUCTS and args[-1].dtype in _INTEGERS:
        raise RuntimeError(f'"{name}_cuda" not implemented for integers')
    generator = kwargs.get("generator")
    if generator is not None and generator._cdata not in GENERATORS:
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")


def _on_host(value: Any) -> Any:
    if isinstance(value, Tensor):
        return alias(value)
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == "cuda" else value
    return type(value)(map(_on_host, value)) if isinstance(value, (list, tuple)) else value


@cache
def _written(op: Any) -> tuple[tuple[int, str] | None, ...]:
    """For each result of an operator the argument that it is, as (position, name), or None for a new one."""
    schema = op._schema
    found = []
    for result in schema.returns:
        letters = result.alias_info.before_set if result.alias_info is not None else set()
        same = ((place, argument.name) for place, argument in enumerate(schema.arguments)
                if argument.alias_info is not None and argument.alias_info.before_set & letters)
        found.append(next(same, None))
    return tuple(found)


@cache
def _is_view(op: Any) -> bool:
    """Whether the first result is a view of the first argument."""
    schema = op._schema
    if not schema.arguments or not schema.returns:
        return False
    first, result = schema.arguments[0].alias_info, schema.returns[0].alias_info
    if first is None or result is None or first.is_write:
        return False
    return bool(result.before_set & first.before_set)


@cache
def _takes_tensors(op: Any) -> tuple[int, ...]:
    return tuple(place for place, argument in enumerate(op._schema.arguments)
                 if str(argument.type) == "Tensor")


def _with_tensors(op: Any, args: tuple) -> tuple:
    """Wrap numbers where the schema says Tensor: torch had wrapped them, and they arrive as numbers."""
    places = [place for place in _takes_tensors(op) if place < len(args)
              and not isinstance(args[place], Tensor) and isinstance(args[place], (bool, int, float))]
    if not places:
        return args
    like = next((tensor for tensor in tensors_of(args)), None)
    changed = list(args)
    for place in places:
        number = args[place]
        fits = like is not None and not (isinstance(number, float) and not like.dtype.is_floating_point)
        dtype = like.dtype if fits else None
        changed[place] = torch.scalar_tensor(number, dtype=dtype) if dtype else torch.tensor(number)
    return tuple(changed)


def fallback(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Do what a CUDA kernel would: check, compute on the host's aliases, wrap."""
    name = op._schema.name.partition("::")[2]
    if _is_view(op):
        return op.redispatch(_CPU, *args, **kwargs)
    device = _check_devices(op, args, kwargs)
    args = _with_tensors(op, args)
    _refuse(op, args, kwargs)
    if name in _WAITS or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        RECORD.add("size that depends on numbers", name)
    out = [value for key, value in kwargs.items()
           if key in _OUT and isinstance(value, Tensor) and _is_out(op, key)]
    if any(tensor.numel() == 0 for tensor in out):           # an alias cannot grow
        return _into_empty(op, args, kwargs, device)
    with torch._C._AutoDispatchBelowAutograd():
        results = op(*map(_on_host, args), **{key: _on_host(value) for key, value in kwargs.items()})
    return _wrapped(op, results, args, kwargs, device)


@cache
def _is_out(op: Any, key: str) -> bool:
    return any(argument.name == key and argument.is_out for argument in op._schema.arguments)


def _into_empty(op: Any, args: tuple, kwargs: dict, device: torch.device) -> Any:
    targets = {key: value for key, value in kwargs.items() if isinstance(value, Tensor) and _is_out(op, key)}
    own = {key: torch.empty(0, dtype=value.dtype) if key in targets else _on_host(value)
           for key, value in kwargs.items()}
    with torch._C._AutoDispatchBelowAutograd():
        op(*map(_on_host, args), **own)
    for key, target in targets.items():
        target.resize_(own[key].shape)
        alias(target).copy_(own[key])
    written = tuple(targets.values())
    return written[0] if len(written) == 1 else written


def _wrapped(op: Any, results: Any, args: tuple, kwargs: dict, device: torch.device) -> Any:
    written = _written(op)
    several = isinstance(results, tuple) and len(op._schema.returns) > 1
    wrapped = []
    for result, source in zip(results if several else (results,), written):
        if source is not None:
            place, argument = source
            wrapped.append(args[place] if place < len(args) else kwargs[argument])
        elif isinstance(result, Tensor):
            wrapped.append(to_device(result, device))
        elif isinstance(result, (list, tuple)):
            wrapped.append([to_device(entry, device) if isinstance(entry, Tensor) else entry
                            for entry in result])
        else:
            wrapped.append(result)
    return tuple(wrapped) if several else wrapped[0] if wrapped else None


def _empty_memory_format(size: Any, dtype: Any = None, layout: Any = None, device: Any = None,
                         pin_memory: Any = None, memory_format: Any = None) -> Tensor:
    like = torch.empty(size, device="meta", memory_format=memory_format or torch.contiguous_format)
    return empty(size, like.stride(), dtype or torch.get_default_dtype(), device)


def _empty_strided(size: Any, stride: Any, dtype: Any = None, layout: Any = None, device: Any = None,
                   pin_memory: Any = None) -> Tensor:
    return empty(size, stride, dtype or torch.get_default_dtype(), device)


def _local_scalar_dense(tensor: Tensor) -> Any:
    RECORD.add("read", "item")
    return aten._local_scalar_dense(alias(tensor))


def _copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if target.device.type != source.device.type:
        down = target.device.type == "cpu"
        host = target if down else source
        if not non_blocking:
            RECORD.add("copy to the host" if down else "copy to the device", "copy_")
        elif not down and not host.is_pinned():
            RECORD.add("copy to the device, may wait", "copy_")
    with torch._C._AutoDispatchBelowAutograd():
        alias(target).copy_(alias(source))
    return target


def _resize_(tensor: Tensor, size: Any, memory_format: Any = None) -> Tensor:
    needed = 0 if 0 in size else torch.Size(size).numel() * tensor.dtype.itemsize
    if tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.dtype.itemsize < needed:
        new = empty(size, torch.empty(size, device="meta").stride(), tensor.dtype, tensor.device)
        return tensor.set_(new)
    strides = torch.empty(size, device="meta").stride()
    return tensor.set_(tensor.untyped_storage(), tensor.storage_offset(), size, strides)


def _grouped_mm(x: Tensor, weights: Tensor, offs: Tensor | None = None, bias: Tensor | None = None,
                out_dtype: torch.dtype | None = None) -> Tensor:
    op = aten._grouped_mm.default
    given = (x, weights) if offs is None else (x, weights, offs)
    device = _check_devices(op, given, {})
    if any(tensor.device.type != "cuda" for tensor in given):
        raise RuntimeError("Expected all tensors to be on the same device: "
                           "grouped_mm takes its offsets from the device")
    if any(tensor.data_ptr() % 16 for tensor in (x, weights)):
        raise RuntimeError("data_ptr of grouped_mm's operands must be a multiple of 16")
    if x.dtype != torch.bfloat16:
        RECORD.add("read", "_grouped_mm")            # torch's loop over groups reads the offsets
    with torch._C._AutoDispatchBelowAutograd():
        ends = None if offs is None else alias(offs)
        return to_device(op(alias(x), alias(weights), ends, bias, out_dtype), device)


_VIEWS = ("as_strided", "view", "_reshape_alias", "set_.source_Storage", "set_.source_Storage_storage_offset",
          "set_.source_Tensor", "set_")


def _redispatched(name: str) -> Callable:
    packet, _, overload = name.partition(".")
    op = getattr(getattr(aten, packet), overload or "default")
    return lambda *args, **kwargs: op.redispatch(_CPU, *args, **kwargs)


def _fill_(tensor: Tensor, value: Any) -> Tensor:
    if isinstance(value, Tensor) and value.device.type == "cpu":
        RECORD.add("number of the host", "fill_")
    with torch._C._AutoDispatchBelowAutograd():
        alias(tensor).fill_(alias(value) if isinstance(value, Tensor) else value)
    return tensor


def register_operators() -> list[torch.library.Library]:
    everything = torch.library.Library("_", "IMPL")
    everything.fallback(fallback, "CUDA")
    named = torch.library.Library("aten", "IMPL", "CUDA")
    for name, kernel in {"empty.memory_format": _empty_memory_format, "empty_strided": _empty_strided,
                         "copy_": _copy_, "_local_scalar_dense": _local_scalar_dense, "resize_": _resize_,
                         "_grouped_mm": _grouped_mm, "fill_.Scalar": _fill_, "fill_.Tensor": _fill_}.items():
        named.impl(name, kernel)
    for name in _VIEWS:
        named.impl(name, _redispatched(name))
    return [everything, named]
