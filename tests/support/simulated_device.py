"""CUDA devices in host memory: real arithmetic and real gloo, the refusals of a GPU, and a record of host waits.

    install(devices=2)                   before anything asks for CUDA; changes the process for good, so in one of its own
    RECORD                               what made the host wait: phase, direction, kind, operator and place in moetrain

After it `torch.device("cuda", 0)` works on a CPU build of torch: plain tensors with storages, strides and data pointers.
What no composite kernel resolves arrives at one fallback for the dispatch key CUDA: it checks devices, runs the CPU's kernel
on aliases of the memory and wraps what comes. Memory that nobody wrote is NaN. Groups made with `nccl` refuse tensors of the
CPU; gloo groups of the same ranks beside them move the bytes. No module of moetrain is patched.

More lenient than a GPU: work is done when it is posted, so a missing wait between streams, or a missing record_stream, does
not show; NCCL's rules (one order over communicators, one rank a GPU) are not looked at; the random numbers are the CPU's; the
kernels are the CPU's, with its dtypes and its choice of attention.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).with_suffix(".cpp")
ALIGNMENT = 64
CAPABILITY = (9, 0)

_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
aten = torch.ops.aten


# --- the record of waits


class Wait(NamedTuple):
    phase: str
    backward: bool
    kind: str
    operator: str
    place: str                                       # file:function of the innermost frame in moetrain


class Record(Counter[Wait]):
    """How often the host waited for the device, or may have."""

    phase = "setup"

    def add(self, kind: str, operator: str) -> None:
        backward = torch._C._current_graph_task_id() != -1
        self[Wait(self.phase, backward, kind, operator, place())] += 1


RECORD = Record()


def place() -> str:
    """The innermost function of moetrain on the stack that is not a dispatch mode's."""
    frame = sys._getframe(2)
    while frame is not None:
        module, name = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        if module.startswith("moetrain.") and name not in ("__torch_dispatch__", "_keep", "_give"):
            return f"{module.removeprefix('moetrain.').replace('.', '/')}.py:{name}"
        frame = frame.f_back
    return ""


# --- memory


class _Tensor(ctypes.Structure):
    """DLPack's DLManagedTensor."""

    _fields_ = [("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
                ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
                ("shape", ctypes.c_void_p), ("strides", ctypes.c_void_p), ("byte_offset", ctypes.c_uint64),
                ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


_libc = ctypes.CDLL(None)
_libc.malloc.restype, _libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
_libc.free.argtypes = [ctypes.c_void_p]
_FREE = ctypes.cast(_libc.free, ctypes.c_void_p).value
_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype, _capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_HEADER = ctypes.sizeof(_Tensor)
_ON_CPU, _ON_CUDA = 1, 2
_CODES = {torch.bool: 6, torch.bfloat16: 4, torch.uint8: 1, torch.complex64: 5, torch.complex128: 5}

allocated, peak = Counter[int](), Counter[int]()     # bytes, by device


def _from_memory(sizes: Iterable[int], strides: Iterable[int], dtype: torch.dtype, *, device: int | None,
                 data: int | None = None) -> Tensor:
    """A tensor over `data`, or over new memory that goes with it. device: None for the CPU."""
    sizes, strides = tuple(sizes), tuple(strides)
    extent = 0 if 0 in sizes else 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides))
    room = extent * dtype.itemsize if data is None else 0
    before = _HEADER + 16 * len(sizes)
    block = _libc.malloc(before + ALIGNMENT + max(room, 1))
    if data is None:
        data = -(-(block + before) // ALIGNMENT) * ALIGNMENT
        ctypes.memset(data, 0xFF, max(room, 1))
    whole = (ctypes.c_int64 * (2 * len(sizes))).from_address(block + _HEADER)
    whole[:] = [*sizes, *strides]
    record = _Tensor.from_address(block)
    record.data, record.device_type, record.device_id = data, _ON_CPU if device is None else _ON_CUDA, device or 0
    record.ndim, record.byte_offset, record.context = len(sizes), 0, None
    record.code = _CODES.get(dtype, 2 if dtype.is_floating_point else 0)
    record.bits, record.lanes = 8 * dtype.itemsize, 1
    record.shape, record.strides = block + _HEADER, block + _HEADER + 8 * len(sizes)
    record.deleter = _FREE                           # so that no Python runs when the memory goes
    return torch.utils.dlpack.from_dlpack(_capsule(block, b"dltensor", None))


def empty(sizes: Iterable[int], strides: Iterable[int], dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """New memory on a device, full of NaN."""
    index = _library().simulated_device() if device is None or device.index is None else device.index
    if not 0 <= index < torch.cuda.device_count():
        raise RuntimeError("CUDA error: invalid device ordinal")
    tensor = _from_memory(sizes, strides, dtype, device=index)
    storage = tensor.untyped_storage()
    size = storage.nbytes()
    allocated[index] += size
    peak[index] = max(peak[index], allocated[index])
    weakref.finalize(storage, allocated.subtract, {index: size}).atexit = False
    return tensor


def alias(tensor: Tensor) -> Tensor:
    """The same numbers as a tensor of the CPU. It does not keep the memory."""
    if tensor.device.type != "cuda":
        return tensor
    same = _from_memory(tensor.shape, tensor.stride(), tensor.dtype, device=None, data=tensor.data_ptr() or None)
    return same._neg_view() if tensor.is_neg() else same


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, with the same strides unless elements share memory."""
    shared = any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride()))
    strides = torch.empty(tensor.shape, device="meta").stride() if shared else tensor.stride()
    copy = empty(tensor.shape, strides, tensor.dtype, device)
    alias(copy).copy_(tensor)
    return copy


# --- operators


_MIXES = {"where", "masked_fill", "masked_fill_", "index_put", "lerp", "addcmul", "addcdiv", "fill", "index_fill",
          "floor_divide", "floor_divide_"}
_TAKES_HOST_INDEX = {"index", "index_put_", "_index_put_impl_", "index_put"}
_WAITS = {"nonzero", "masked_select", "unique", "_unique2", "unique_dim", "unique_consecutive", "equal", "bincount", "nonzero_static"}


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _check_devices(op: Any, args: tuple, kwargs: dict) -> torch.device:
    """The device of all operands; RuntimeError, as from CUDA, where there are two."""
    name = op._schema.name.partition("::")[2]
    operands = list(_tensors([*args, *kwargs.values()]))
    on_device = [tensor for tensor in operands if tensor.device.type == "cuda"]
    devices = {tensor.device for tensor in on_device}
    if not devices:
        where = kwargs.get("device")
        return where if where is not None and where.index is not None else torch.device("cuda", _library().simulated_device())
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
    if name in ("mm", "bmm", "addmm", "baddbmm", "addmv", "mv", "dot") and args[-1].dtype in (torch.int64, torch.int32, torch.int16):
        raise RuntimeError(f'"{name}_cuda" not implemented for integers')
    generator = kwargs.get("generator")
    if generator is not None and generator._cdata not in _OF_DEVICES:
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
        found.append(next(((place, argument.name) for place, argument in enumerate(schema.arguments)
                           if letters and argument.alias_info is not None and argument.alias_info.before_set & letters), None))
    return tuple(found)


@cache
def _is_view(op: Any) -> bool:
    """Whether the first result is a view of the first argument."""
    schema = op._schema
    if not schema.arguments or not schema.returns:
        return False
    first, result = schema.arguments[0].alias_info, schema.returns[0].alias_info
    return first is not None and result is not None and not first.is_write and bool(result.before_set & first.before_set)


@cache
def _takes_tensors(op: Any) -> tuple[int, ...]:
    return tuple(place for place, argument in enumerate(op._schema.arguments) if str(argument.type) == "Tensor")


def _with_tensors(op: Any, args: tuple) -> tuple:
    """Numbers that torch had wrapped arrive as numbers where the schema says Tensor."""
    places = [place for place in _takes_tensors(op) if place < len(args) and not isinstance(args[place], Tensor)
              and isinstance(args[place], (bool, int, float))]
    if not places:
        return args
    like = next((tensor for tensor in _tensors(args)), None)
    changed = list(args)
    for place in places:
        number = args[place]
        dtype = None if like is None or (isinstance(number, float) and not like.dtype.is_floating_point) else like.dtype
        changed[place] = torch.scalar_tensor(number, dtype=dtype) if dtype else torch.tensor(number)
    return tuple(changed)


def _fallback(op: Any, *args: Any, **kwargs: Any) -> Any:
    """What a CUDA kernel would do: check, compute on the host's aliases, wrap."""
    name = op._schema.name.partition("::")[2]
    if _is_view(op):
        return op.redispatch(_CPU, *args, **kwargs)
    device = _check_devices(op, args, kwargs)
    args = _with_tensors(op, args)
    _refuse(op, args, kwargs)
    if name in _WAITS or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        RECORD.add("size that depends on numbers", name)
    out = [value for key, value in kwargs.items() if key in ("out", "out0", "out1", "out2", "values", "indices", "total_weight")
           and isinstance(value, Tensor) and _is_out(op, key)]
    if any(tensor.numel() == 0 for tensor in out):           # an alias cannot grow
        return _into_empty(op, args, kwargs, device)
    with torch._C._AutoDispatchBelowAutograd():
        results = op(*map(_on_host, args), **{key: _on_host(value) for key, value in kwargs.items()})
    return _wrapped(op, results, args, kwargs, device)


@cache
def _is_out(op: Any, key: str) -> bool:
    return any(argument.name == key and argument.is_out for argument in op._schema.arguments)


def _into_empty(op: Any, args: tuple, kwargs: dict, device: torch.device) -> Any:
    own = {key: torch.empty(0, dtype=value.dtype) if isinstance(value, Tensor) and _is_out(op, key) else _on_host(value)
           for key, value in kwargs.items()}
    with torch._C._AutoDispatchBelowAutograd():
        op(*map(_on_host, args), **own)
    given = [(value, own[key]) for key, value in kwargs.items() if isinstance(value, Tensor) and _is_out(op, key)]
    for target, result in given:
        target.resize_(result.shape)
        alias(target).copy_(result)
    targets = tuple(target for target, _ in given)
    return targets[0] if len(targets) == 1 else targets


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
            wrapped.append([to_device(entry, device) if isinstance(entry, Tensor) else entry for entry in result])
        else:
            wrapped.append(result)
    return tuple(wrapped) if several else wrapped[0] if wrapped else None


def _empty_memory_format(size: Any, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None,
                         memory_format: Any = None) -> Tensor:
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
        raise RuntimeError("Expected all tensors to be on the same device: grouped_mm takes its offsets from the device")
    if any(tensor.data_ptr() % 16 for tensor in (x, weights)):
        raise RuntimeError("data_ptr of grouped_mm's operands must be a multiple of 16")
    if x.dtype != torch.bfloat16:
        RECORD.add("read", "_grouped_mm")            # torch's loop over groups reads the offsets
    with torch._C._AutoDispatchBelowAutograd():
        return to_device(op(alias(x), alias(weights), None if offs is None else alias(offs), bias, out_dtype), device)


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


def _register_operators() -> list[torch.library.Library]:
    everything = torch.library.Library("_", "IMPL")
    everything.fallback(_fallback, "CUDA")
    named = torch.library.Library("aten", "IMPL", "CUDA")
    for name, kernel in {"empty.memory_format": _empty_memory_format, "empty_strided": _empty_strided, "copy_": _copy_,
                         "_local_scalar_dense": _local_scalar_dense, "resize_": _resize_, "_grouped_mm": _grouped_mm,
                         "fill_.Scalar": _fill_, "fill_.Tensor": _fill_}.items():
        named.impl(name, kernel)
    for name in _VIEWS:
        named.impl(name, _redispatched(name))
    return [everything, named]


# --- collectives


_BESIDE: dict[str, dist.ProcessGroup] = {}           # by the name of a group: the gloo group of the same ranks


def _kept_alias(tensor: Tensor) -> Tensor:
    """An alias that keeps the device's memory: a collective may still read it when its caller has let go of it."""
    same = alias(tensor)
    same.untyped_storage().of_device = tensor.untyped_storage()
    return same


def _collective(name: str) -> Callable:
    op = getattr(torch.ops.c10d, name).default
    schema = op._schema
    group_at = next(place for place, argument in enumerate(schema.arguments) if argument.name == "process_group")

    def run(*args: Any) -> Any:
        args = list(args)
        group = dist.ProcessGroup.unbox(args[group_at])
        beside = _BESIDE.get(group.group_name, group)
        if beside is not group and any(tensor.device.type != "cuda" for tensor in _tensors(args)):
            raise RuntimeError("No backend type associated with device type cpu")
        if name == "barrier":
            RECORD.add("barrier", name)
        host = [_nested(argument, _kept_alias) for argument in args]
        host[group_at] = beside.boxed()
        results = op.redispatch(_CPU, *host)
        if isinstance(results, tuple):               # (tensors as given, work)
            return (args[0], *results[1:])
        return results

    return run


def _nested(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    return [_nested(entry, change) for entry in value] if isinstance(value, (list, tuple)) else value


_COLLECTIVES = ("allreduce_", "allreduce_coalesced_", "broadcast_", "allgather_", "_allgather_base_", "allgather_coalesced_",
                "allgather_into_tensor_coalesced_", "reduce_scatter_", "_reduce_scatter_base_",
                "reduce_scatter_tensor_coalesced_", "reduce_", "gather_", "scatter_", "alltoall_", "alltoall_base_", "send",
                "recv_", "barrier")


def _register_collectives() -> torch.library.Library:
    library = torch.library.Library("c10d", "IMPL", "CUDA")
    for name in _COLLECTIVES:
        library.impl(name, _collective(name), allow_override=True)
    init, new_group, backend_of = dist.init_process_group, dist.new_group, dist.get_backend

    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
        kwargs.pop("device_id", None)
        if backend != "nccl":
            return init(backend, *args, **kwargs)
        init("cuda:gloo", *args, **kwargs)
        _NCCL.add(dist.group.WORLD.group_name)
        _BESIDE[dist.group.WORLD.group_name] = new_group(backend="gloo")

    def make_group(ranks: Any = None, *args: Any, **kwargs: Any) -> Any:
        world = dist.group.WORLD.group_name
        if world not in _NCCL or kwargs.get("backend") not in (None, "nccl"):
            return new_group(ranks, *args, **kwargs)
        kwargs["backend"] = "cuda:gloo"
        group = new_group(ranks, *args, **kwargs)
        beside = new_group(ranks, backend="gloo")
        if isinstance(group, dist.ProcessGroup):
            _NCCL.add(group.group_name)
            _BESIDE[group.group_name] = beside
        return group

    def get_backend(group: Any = None) -> str:
        name = (group or dist.group.WORLD).group_name
        return "nccl" if name in _NCCL else backend_of(group)

    for module in (dist, dist.distributed_c10d):
        module.init_process_group, module.new_group, module.get_backend = init_process_group, make_group, get_backend
    return library


_NCCL: set[str] = set()


# --- torch.cuda


class _Stream(torch.Stream):
    """FSDP2 mixes streams of torch.cuda and torch.accelerator, so they are one class."""

    def __new__(cls, device: Any = None, priority: int = 0, **kwargs: Any) -> "_Stream":
        if "stream_id" in kwargs:
            return super().__new__(cls, **kwargs)
        return super().__new__(cls, device=_device(device), priority=priority)

    def synchronize(self) -> None:
        RECORD.add("synchronize", "stream")


class _InStream:
    """The context manager of torch.cuda.stream."""

    def __init__(self, stream: torch.Stream | None) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        if self.stream is not None:
            self.stream.__enter__()

    def __exit__(self, *error: object) -> None:
        if self.stream is not None:
            self.stream.__exit__(*error)


class _OnDevice:
    """The context manager of torch.cuda.device."""

    def __init__(self, device: Any) -> None:
        self.index = _device(device).index

    def __enter__(self) -> None:
        self.before = torch.cuda.current_device()
        torch.cuda.set_device(self.index)

    def __exit__(self, *error: object) -> None:
        torch.cuda.set_device(self.before)


def _device(device: Any = None) -> torch.device:
    if device is None:
        return torch.device("cuda", torch.cuda.current_device())
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return device if device.index is not None else torch.device("cuda", torch.cuda.current_device())


class _Properties(NamedTuple):
    name: str = "Simulated CUDA device"
    major: int = CAPABILITY[0]
    minor: int = CAPABILITY[1]
    total_memory: int = 8 << 30
    multi_processor_count: int = 132
    warp_size: int = 32


def _patch_cuda(devices: int) -> None:
    library, cuda = _library(), torch.cuda

    def set_device(device: Any) -> None:
        index = _device(device).index
        if not 0 <= index < devices:
            raise RuntimeError("CUDA error: invalid device ordinal")
        library.simulated_set_device(index)

    def synchronize(device: Any = None) -> None:
        RECORD.add("synchronize", "device")

    def stream_of(device: Any = None) -> _Stream:
        device = _device(device)
        return _Stream(stream_id=library.simulated_stream(device.index), device_index=device.index,
                       device_type=torch._C._autograd.DeviceType.CUDA.value)

    total = _Properties().total_memory
    replaced: dict[str, Any] = {
        "is_available": lambda: True, "device_count": lambda: devices, "current_device": lambda: library.simulated_device(),
        "set_device": set_device, "synchronize": synchronize, "init": lambda: None, "_lazy_init": lambda: None,
        "is_initialized": lambda: True, "_is_in_bad_fork": lambda: False, "_is_compiled": lambda: True,
        "Stream": _Stream, "Event": torch.Event, "stream": _InStream, "device": _OnDevice, "current_stream": stream_of,
        "default_stream": stream_of, "empty_cache": lambda: None, "is_bf16_supported": lambda *_, **__: True,
        "memory_allocated": lambda device=None: allocated[_device(device).index],
        "memory_reserved": lambda device=None: allocated[_device(device).index],
        "max_memory_allocated": lambda device=None: peak[_device(device).index],
        "max_memory_reserved": lambda device=None: peak[_device(device).index],
        "reset_peak_memory_stats": lambda device=None: peak.__setitem__(_device(device).index, allocated[_device(device).index]),
        "mem_get_info": lambda device=None: (total - allocated[_device(device).index], total),
        "get_device_name": lambda device=None: _Properties().name,
        "get_device_properties": lambda device=None: _Properties(),
        "get_device_capability": lambda device=None: CAPABILITY,
        "manual_seed": torch.default_generator.manual_seed, "manual_seed_all": torch.default_generator.manual_seed, "_sleep": lambda cycles: None,
    }
    for name, value in replaced.items():
        setattr(cuda, name, value)
    torch._C._nccl_version = lambda: 2 << 32 | 27 << 16
    torch._C._nccl_version_suffix = lambda: b""
    torch._C._cuda_getDevice = lambda: library.simulated_device()
    torch._C._cuda_getCurrentRawStream = lambda device: library.simulated_stream(device)
    torch.Tensor.record_stream = lambda tensor, stream: None
    torch.Generator = _Generator
    _patch_storage()


def _patch_storage() -> None:
    """FSDP2 frees memory by a resize to 0: what lay there is poisoned, and stays."""
    resize = torch.UntypedStorage.resize_

    def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        if storage.device.type != "cuda":
            return resize(storage, size)
        if size == 0:
            ctypes.memset(storage.data_ptr(), 0xFF, storage.nbytes())
        else:
            assert size <= storage.nbytes(), "memory of the simulated device does not grow"
        return storage

    torch.UntypedStorage.resize_ = resize_


class _Generator(torch.Generator):
    """A generator of the CPU; those made for a device are remembered by address."""

    def __new__(cls, device: Any = "cpu") -> "_Generator":
        made = super().__new__(cls)
        if torch.device(device).type == "cuda":
            _OF_DEVICES.add(made._cdata)
        return made


_OF_DEVICES: set[int] = set()


# --- installation


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(built()))
    library.simulated_stream.restype = ctypes.c_int64
    library.simulated_host_waits.restype = ctypes.c_int64
    return library


def unavailable() -> str:
    """Why there is no simulated device on this machine; empty where there is one."""
    if torch.version.cuda is not None:
        return "torch has CUDA: the real device is tested"
    return "" if shutil.which("g++") else "no g++ to build the device's guard"


def built() -> Path:
    """The library of simulated_device.cpp, built once for its source and this torch."""
    folder = Path(torch.__file__).parent
    digest = hashlib.sha256(torch.__version__.encode() + SOURCE.read_bytes()).hexdigest()[:16]
    library = ROOT / "build" / "simulated_device" / f"{digest}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")       # two processes may build at once
        subprocess.run(["g++", "-std=c++20", "-O1", "-g0", "-fPIC", "-shared", "-isystem", str(folder / "include"), str(SOURCE),
                        "-L", str(folder / "lib"), "-ltorch_cpu", "-lc10", "-o", str(unfinished)], check=True)
        unfinished.rename(library)
    return library


def install(devices: int = 1) -> None:
    """Give this process CUDA devices. Call it before anything asks for CUDA; it cannot be undone."""
    assert not unavailable(), unavailable()
    if _INSTALLED:
        return
    _library().simulated_install(devices)
    _patch_cuda(devices)
    _INSTALLED.extend([*_register_operators(), _register_collectives()])


_INSTALLED: list[torch.library.Library] = []
