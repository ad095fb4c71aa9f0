"""Functions of torch.cuda that moetrain, FSDP2 and DeepSpeed call, for the simulated devices."""

import ctypes
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity
from torch.profiler.profiler import _KinetoProfile

from tests.support.simulated_device.guard import library
from tests.support.simulated_device.memory import allocated, peak
from tests.support.simulated_device.waits import RECORD

CAPABILITY = (9, 0)


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
    L2_cache_size: int = 1 << 20             # less than a GPU's: inputs of benchmarks are 3 times its size
    clock_rate: int = 1_000_000              # kHz


def patch_cuda(devices: int) -> None:
    guard, cuda = library(), torch.cuda

    def set_device(device: Any) -> None:
        index = _device(device).index
        if not 0 <= index < devices:
            raise RuntimeError("CUDA error: invalid device ordinal")
        guard.simulated_set_device(index)

    def synchronize(device: Any = None) -> None:
        RECORD.add("synchronize", "device")

    def stream_of(device: Any = None) -> _Stream:
        device = _device(device)
        return _Stream(stream_id=guard.simulated_stream(device.index), device_index=device.index,
                       device_type=torch._C._autograd.DeviceType.CUDA.value)

    total, seed = _Properties().total_memory, torch.default_generator.manual_seed

    def reset_peak(device: Any = None) -> None:
        index = _device(device).index
        peak[index] = allocated[index]

    replaced: dict[str, Any] = {
        "is_available": lambda: True, "device_count": lambda: devices,
        "current_device": lambda: guard.simulated_device(), "set_device": set_device,
        "synchronize": synchronize, "init": lambda: None, "_lazy_init": lambda: None,
        "is_initialized": lambda: True, "_is_in_bad_fork": lambda: False, "_is_compiled": lambda: True,
        "Stream": _Stream, "Event": torch.Event, "stream": _InStream, "device": _OnDevice,
        "current_stream": stream_of, "default_stream": stream_of, "empty_cache": lambda: None,
        "is_bf16_supported": lambda *_, **__: True,
        "memory_allocated": lambda device=None: allocated[_device(device).index],
        "memory_reserved": lambda device=None: allocated[_device(device).index],
        "max_memory_allocated": lambda device=None: peak[_device(device).index],
        "max_memory_reserved": lambda device=None: peak[_device(device).index],
        "reset_peak_memory_stats": reset_peak,
        "mem_get_info": lambda device=None: (total - allocated[_device(device).index], total),
        "get_device_name": lambda device=None: _Properties().name,
        "get_device_properties": lambda device=None: _Properties(),
        "get_device_capability": lambda device=None: CAPABILITY,
        "manual_seed": seed, "manual_seed_all": seed, "_sleep": lambda cycles: None,
    }
    for name, value in replaced.items():
        setattr(cuda, name, value)
    torch._C._nccl_version = lambda: 2 << 32 | 27 << 16
    torch._C._nccl_version_suffix = lambda: b""
    torch._C._cuda_getDevice = lambda: guard.simulated_device()
    torch._C._cuda_getCurrentRawStream = lambda device: guard.simulated_stream(device)
    torch.Tensor.record_stream = lambda tensor, stream: None
    torch.Generator = _Generator
    _patch_storage()
    _patch_profiler()


def _patch_profiler() -> None:
    """Profile the CPU alone.

    A CPU build has no tracer of kernels and prints a stack for every operator where it is asked for one.
    """
    init = _KinetoProfile.__init__

    def of_the_host(profile: _KinetoProfile, *, activities: object = None, **options: Any) -> None:
        init(profile, activities=[ProfilerActivity.CPU], **options)

    _KinetoProfile.__init__ = of_the_host


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
            GENERATORS.add(made._cdata)
        return made


GENERATORS: set[int] = set()
