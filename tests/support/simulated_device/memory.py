"""Device memory on the host: tensors of the device over malloc blocks, CPU aliases of them, bytes in use."""

import ctypes
import weakref
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from tests.support.simulated_device.guard import library

ALIGNMENT = 64


class _Tensor(ctypes.Structure):
    """DLPack's DLManagedTensor."""

    _fields_ = [("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
                ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8),
                ("lanes", ctypes.c_uint16), ("shape", ctypes.c_void_p), ("strides", ctypes.c_void_p),
                ("byte_offset", ctypes.c_uint64), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


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
    """Tensor over `data`, or over new memory that goes with it; `device` is None for the CPU."""
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
    record.data, record.device_id = data, device or 0
    record.device_type = _ON_CPU if device is None else _ON_CUDA
    record.ndim, record.byte_offset, record.context = len(sizes), 0, None
    record.code = _CODES.get(dtype, 2 if dtype.is_floating_point else 0)
    record.bits, record.lanes = 8 * dtype.itemsize, 1
    record.shape, record.strides = block + _HEADER, block + _HEADER + 8 * len(sizes)
    record.deleter = _FREE                           # so that no Python runs when the memory goes
    return torch.utils.dlpack.from_dlpack(_capsule(block, b"dltensor", None))


def empty(sizes: Iterable[int], strides: Iterable[int], dtype: torch.dtype,
          device: torch.device | None) -> Tensor:
    """New memory on a device, full of NaN."""
    index = current(device)
    tensor = _from_memory(sizes, strides, dtype, device=index)
    storage = tensor.untyped_storage()
    size = storage.nbytes()
    allocated[index] += size
    peak[index] = max(peak[index], allocated[index])
    weakref.finalize(storage, allocated.subtract, {index: size}).atexit = False
    return tensor


def over(host: Tensor, index: int) -> Tensor:
    """Memory of the host as a tensor of a device, which keeps the memory."""
    tensor = _from_memory(host.shape, host.stride(), host.dtype, device=index, data=host.data_ptr())
    tensor.untyped_storage().of_host = host.untyped_storage()
    return tensor


def current(device: torch.device | None) -> int:
    """The index of a device, or of the current one where none is said."""
    index = library().simulated_device() if device is None or device.index is None else device.index
    if not 0 <= index < torch.cuda.device_count():
        raise RuntimeError("CUDA error: invalid device ordinal")
    return index


def alias(tensor: Tensor) -> Tensor:
    """The same numbers as a tensor of the CPU. It does not keep the memory."""
    if tensor.device.type != "cuda":
        return tensor
    same = _from_memory(tensor.shape, tensor.stride(), tensor.dtype, device=None,
                        data=tensor.data_ptr() or None)
    return same._neg_view() if tensor.is_neg() else same


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, with the same strides unless elements share memory."""
    shared = any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride()))
    strides = torch.empty(tensor.shape, device="meta").stride() if shared else tensor.stride()
    copy = empty(tensor.shape, strides, tensor.dtype, device)
    alias(copy).copy_(tensor)
    return copy
