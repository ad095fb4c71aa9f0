"""State shards: the part of a model that this rank holds, under names that do not depend on the mesh.

A *logical tensor* is one matrix of the model: `layers.0.attention.qkv.weight`, or one matrix of one expert,
`layers.0.moe.experts.5.gate_up` (gate rows, then up rows) and `….down`. A *shard* is a range of its rows, or
all of them. Initialization, checkpoints and tests see the storage of parameters only in this form:

    stacked experts of a bank       a shard for each expert and matrix
    sliced experts of a bank        a range of rows for each expert and matrix
    FSDP2, Shard(0)                 a range of rows; of stacked experts: some of the experts
    FSDP2, Shard(1) of a stack      a range of rows of every expert of the bank

Shards are views: writing into one changes the parameter (or the gradient, or the moment) behind it.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from moetrain.moe.bank import ExpertBank
from moetrain.plan.placement import slice_rows

# Dtypes by their names in a checkpoint.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Of = Callable[[nn.Parameter], Tensor | None]


class StateShard(NamedTuple):
    """Range of rows of a logical tensor.

    Attributes:
        name: name of the logical tensor.
        shape: shape of the whole tensor.
        begin: first row of the range.
        rows: the rows, a view of the stored tensor. A scalar is its own single row, without a dim.
        held_by: name of the mesh group whose ranks all hold this same shard (comm/mesh.py).
        stored: name of the parameter or buffer that holds the rows; empty for state of other kinds.
    """

    name: str
    shape: tuple[int, ...]
    begin: int
    rows: Tensor
    held_by: str
    stored: str = ""


def state_shards(model: nn.Module, of: Of = lambda parameter: parameter.data) -> Iterator[StateShard]:
    """Iterate over the shards that this rank holds. A tensor of which it holds no row has none.

    Args:
        model: the model, sharded or not.
        of: maps each parameter to a tensor stored like it, such as its gradient or an optimizer moment. Where
            it returns None, the parameter is skipped.
    """
    for path, module in model.named_modules():
        if isinstance(module, ExpertBank):
            experts = experts_path(path)
            for name in module.names:
                yield from _of_experts(experts, name, module.experts, of(module.stacked(name)),
                                       f"{path}.{name}")
            if module.cut is not None:
                for name, slices, shape in zip(module.names, module.slices, module.shapes):
                    begin = slice_rows(shape[0], *module.cut).start
                    yield from _of_sliced(experts, name, module.sliced, shape, begin,
                                          of(module.stacked(slices)), f"{path}.{slices}")
        else:
            for name, parameter in module.named_parameters(path, recurse=False):
                yield from _of_dense(name, of(parameter))


def experts_path(bank: str) -> str:
    """Path below which the experts of a bank are named, from the path of the bank."""
    return f"{bank.removesuffix('.experts.bank')}.experts"


def buffers(model: nn.Module) -> Iterator[StateShard]:
    """Iterate over persistent buffers, such as routers' selection biases: whole and equal on every rank."""
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(path, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield StateShard(name, tuple(buffer.shape), 0, buffer, "batch", name)


def weights(model: nn.Module) -> Iterator[StateShard]:
    """Iterate over the parameters and persistent buffers of a model, by the names of a checkpoint."""
    yield from (shard._replace(name=f"model.{shard.name}") for shard in state_shards(model))
    yield from (shard._replace(name=f"buffer.{shard.name}") for shard in buffers(model))


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank stores; the tensor itself unless it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _of_dense(name: str, tensor: Tensor | None) -> Iterator[StateShard]:
    """Iterate over the shard of a dense parameter, if there is one here."""
    if tensor is None:
        return
    dim, begin = shard_of(tensor)
    assert dim == 0, (name, dim)
    rows = local(tensor)
    if not rows.ndim or len(rows):
        sharded = isinstance(tensor, DTensor)
        yield StateShard(name, tuple(tensor.shape), begin, rows,
                         "dense_replicas" if sharded else "dense_grad", name)


def _of_experts(prefix: str, matrix: str, experts: tuple[int, ...], stacked: Tensor | None,
                stored: str) -> Iterator[StateShard]:
    """Iterate over the shards of experts that are stored whole, or sharded by FSDP2."""
    if stacked is None:
        return
    dim, begin = shard_of(stacked)
    first, row = (begin, 0) if dim == 0 else (0, begin)
    held_by = "expert_replicas" if isinstance(stacked, DTensor) else "expert_grad"
    for index, rows in enumerate(local(stacked)):
        if len(rows):
            yield StateShard(f"{prefix}.{experts[first + index]}.{matrix}", tuple(stacked.shape[1:]), row,
                             rows, held_by, stored)


def _of_sliced(prefix: str, matrix: str, experts: tuple[int, ...], shape: tuple[int, ...], begin: int,
               stacked: Tensor | None, stored: str) -> Iterator[StateShard]:
    """Iterate over this position's slices of sliced experts."""
    if stacked is None or not stacked.shape[1]:          # fewer rows than positions
        return
    for expert, rows in zip(experts, stacked, strict=True):
        yield StateShard(f"{prefix}.{expert}.{matrix}", shape, begin, rows, "expert_grad", stored)


def shard_of(tensor: Tensor) -> tuple[int, int]:
    """Find the sharded dim of a tensor and its first index that is stored here; (0, 0) for a whole tensor.

    FSDP2 cuts a dim into equal shards; the last may be shorter.
    """
    if not isinstance(tensor, DTensor):
        return 0, 0
    for axis, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard):
            size, position = tensor.device_mesh.size(axis), tensor.device_mesh.get_local_rank(axis)
            length = tensor.shape[placement.dim]
            chunk = -(-length // size)
            begin = min(length, position * chunk)
            held = local(tensor).shape[placement.dim]
            assert held == min(chunk, length - begin), (tensor.shape, size, position, held)
            return placement.dim, begin
    return 0, 0
