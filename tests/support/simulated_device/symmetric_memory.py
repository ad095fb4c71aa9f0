"""Symmetric memory for the simulated devices: nameless files in memory that all ranks of a group map."""

import os
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tests.support.simulated_device.collectives import moves_bytes
from tests.support.simulated_device.memory import current, over

_OVERLAP = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"
_FILES: dict[int, int] = {}                          # descriptor of what `empty` made, by its address


class _Handle(NamedTuple):
    """What torch calls _SymmetricMemory: the memory of every rank of the group, as it is mapped here."""

    rank: int
    world_size: int
    mapped: list[Tensor]                             # of uint8

    def get_buffer(self, rank: int, sizes: Any, dtype: torch.dtype, storage_offset: int = 0) -> Tensor:
        first, size = storage_offset * dtype.itemsize, torch.Size(sizes).numel() * dtype.itemsize
        return self.mapped[rank][first:first + size].view(dtype).view(sizes)


def empty(*size: Any, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
    """Memory that `rendezvous` can map elsewhere, full of NaN."""
    shape = torch.Size(size[0] if size and not isinstance(size[0], int) else size)
    dtype = dtype or torch.get_default_dtype()
    file = os.memfd_create("symmetric memory")
    size = shape.numel() * dtype.itemsize
    mapped = _mapped(os.getpid(), file, max(1, size), torch.device(device)).fill_(0xFF)
    _FILES[mapped.data_ptr()] = file
    return mapped[:size].view(dtype).view(shape)


def rendezvous(tensor: Tensor, group: Any) -> _Handle:
    """Map the memory of all ranks. Collective."""
    if tensor.data_ptr() not in _FILES:
        raise RuntimeError("rendezvous: the tensor was not allocated by symmetric memory")
    if not isinstance(group, dist.ProcessGroup):
        group = dist.distributed_c10d._resolve_process_group(group)
    beside, size, file = moves_bytes(group), tensor.untyped_storage().nbytes(), _FILES.pop(tensor.data_ptr())
    told: list[Any] = [None] * group.size()
    dist.all_gather_object(told, (os.getpid(), file, size, tensor.device.index), group=beside)
    devices = [index for _, _, _, index in told]
    if len(set(devices)) < len(devices) and os.environ.get(_OVERLAP) != "1":
        raise RuntimeError("rendezvous: detected allocations from overlapping devices; "
                           f"{_OVERLAP}=1 permits them")
    assert len({size for _, _, size, _ in told}) == 1, told
    mapped = [_mapped(process, number, size, tensor.device) for process, number, _, _ in told]
    dist.barrier(beside)                             # all have opened them
    os.close(file)
    return _Handle(group.rank(), group.size(), mapped)


def _mapped(process: int, file: int, size: int, device: torch.device) -> Tensor:
    host = torch.from_file(f"/proc/{process}/fd/{file}", shared=True, size=size, dtype=torch.uint8)
    return over(host, current(device))


def patch_symmetric_memory() -> None:
    import torch.distributed._symmetric_memory as symmetric

    symmetric.empty, symmetric.rendezvous = empty, rendezvous
