"""Snapshot of the shards that a rank will write, copied to host memory before the next step changes them.

On the CPU every shard is cloned. On a GPU there is one copy into pinned memory for each range of memory that
shards share (the experts of a layer lie in one tensor). All copies run at once, with one wait: a copy for
each shard would mean thousands of waits. The snapshot is complete when `take_snapshot` returns. It takes as
much memory as the shards that this rank writes, until they are written.
"""

import torch
from torch import Tensor

from moetrain.checkpoint.payload import TensorRows
from moetrain.comm.mesh import Mesh
from moetrain.parallel.state_shards import DTYPE_NAMES, StateShard
from moetrain.train.checkpoint.layout import shards_to_write
from moetrain.train.state import TrainState


@torch.no_grad()
def take_snapshot(state: TrainState, mesh: Mesh) -> list[TensorRows]:
    """Copy the shards that this rank writes. Not collective."""
    state_shards = shards_to_write(state.state_shards(), mesh)
    return [_item(shard, copy) for shard, copy in zip(
        state_shards, copies_on_host([shard.rows.detach() for shard in state_shards]))]


def copies_on_host(tensors: list[Tensor]) -> list[Tensor]:
    """Copy tensors to contiguous host memory; the copies are complete when this returns."""
    by_storage: dict[int, list[Tensor]] = {}  # tensors of each storage on a GPU
    for tensor in tensors:
        if tensor.device.type == "cuda":
            by_storage.setdefault(_storage(tensor), []).append(tensor)
    copied = {storage: _start_copy(sharing) for storage, sharing in by_storage.items()}
    if copied:
        torch.cuda.synchronize()
    return [_view_of_copy(tensor, *copied[_storage(tensor)]) if tensor.device.type == "cuda"
            else tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors]


def as_bytes(tensor: Tensor) -> memoryview:
    """View the memory of a contiguous CPU tensor as bytes, without a copy."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def _item(shard: StateShard, copy: Tensor) -> TensorRows:
    rows = len(shard.rows) if shard.shape else 1
    return TensorRows(
        shard.name, DTYPE_NAMES[copy.dtype], tuple(shard.shape), shard.begin, rows, as_bytes(copy))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Index of a tensor's first element in its storage, and of the element after its last."""
    begin = tensor.storage_offset()
    return begin, begin + 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))


def _start_copy(sharing: list[Tensor]) -> tuple[Tensor, int]:
    """Start to copy the range of a storage that spans these tensors of one dtype.

    Returns the copy, still under way, and the index of its first element in the storage.
    """
    extents = [_extent(tensor) for tensor in sharing]
    begin, end = min(first for first, _ in extents), max(last for _, last in extents)
    extent = sharing[0].as_strided((end - begin,), (1,), begin)
    host = torch.empty(extent.shape, dtype=extent.dtype, pin_memory=True)
    return host.copy_(extent, non_blocking=True), begin


def _view_of_copy(tensor: Tensor, host: Tensor, begin: int) -> Tensor:
    return host.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset() - begin).contiguous()
