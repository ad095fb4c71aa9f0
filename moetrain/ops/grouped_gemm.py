"""Grouped matrix products: one product per expert over its rows.

    grouped_product   out[rows of e] = x[rows of e] @ matrix[e]
    grouped_outer     out[e] = a[rows of e].T @ b[rows of e]          the gradient of an expert's matrix
    grouped_wgrad_    acc[e] += the same, products and sums in float32: for gradients that are kept in float32

They have no autograd: the op that uses them (ops/grouped_experts.py) has its own backward. float32
and bfloat16 go through `torch.nn.functional.grouped_mm`. It requires row strides that are multiples of 16
bytes, and leaves rows past the last offset uninitialised: with counts on the host there are none, and with
counts on the device nothing reads them.

A loop of products, which is also the reference, computes what grouped_mm does not: float64, which it refuses,
and other widths. On a GPU the loop also replaces it for the dtypes and chips where grouped_mm is itself a
loop that reads the offsets back, six times per layer and micro-batch: the host knows the counts already.

Shapes: R rows ordered by expert, e experts on this rank, I and O widths.
"""

from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.ops.extension import define
from moetrain.ops.pinned import to_device

# Compute capabilities on which grouped_mm is one kernel, in bfloat16 alone (torch 2.11 to 2.13,
# GroupedBlas.cpp).
ONE_KERNEL = ((9, 0), (10, 0))


Counts: TypeAlias = list[int] | Tensor   # rows of each expert: on the host, or int64 on the device


class Groups(NamedTuple):
    """Rows of each expert. If the counts are not on the host, rows behind the last offset are padding."""

    counts_e: list[int] | None   # on the host, sum to R; None: known to the device alone
    offsets_e: Tensor            # int32, on the device of the rows: where the rows of each expert end

    @property
    def used(self) -> Tensor | None:
        """Number of rows that are not padding, int32 [1] on the device; None if there is no padding."""
        return self.offsets_e[-1:] if self.counts_e is None else None


def takes_counts_on_device(device: torch.device, dtype: torch.dtype, *widths: int) -> bool:
    """Whether grouped_mm is one kernel for these, and so never makes the host wait for the offsets.

    Args:
        device: device of the rows.
        dtype: dtype of rows and matrices.
        widths: both widths of every matrix.
    """
    return (device.type == "cuda" and dtype == torch.bfloat16
            and torch.cuda.get_device_capability(device) in ONE_KERNEL and _aligned(dtype, *widths))


def make_groups(counts_e: list[int] | Tensor, device: torch.device) -> Groups:
    """Make the groups from counts on the host (a list) or on the device (a tensor)."""
    if isinstance(counts_e, Tensor):
        return Groups(None, counts_e.cumsum(0, dtype=torch.int32))
    offsets_e = torch.tensor(counts_e, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return Groups(counts_e, to_device(offsets_e, device))


def grouped_product(x_RI: Tensor, matrix_eIO: Tensor, groups: Groups) -> Tensor:
    """Multiply the rows of each expert by its matrix.

    Args:
        x_RI: rows [R, I], ordered by expert.
        matrix_eIO: matrices [e, I, O] of the same dtype; may be a transposed view.
        groups: rows of each expert.

    Returns:
        Rows [R, O] of the same dtype.
    """
    if _grouped_mm_takes(groups, x_RI, *matrix_eIO.shape[1:]):
        return F.grouped_mm(x_RI, matrix_eIO, offs=groups.offsets_e)
    if x_RI.shape[0] == 0:
        return x_RI.new_empty(0, matrix_eIO.shape[2])
    counts_e = _counts_on_host(groups, x_RI)
    out_RO = x_RI.new_empty(x_RI.shape[0], matrix_eIO.shape[2])
    for rows, matrix, out in zip(x_RI.split(counts_e), matrix_eIO, out_RO.split(counts_e)):
        torch.mm(rows, matrix, out=out)
    return out_RO


def grouped_outer(a_RI: Tensor, b_RO: Tensor, groups: Groups) -> Tensor:
    """Compute a.T @ b over the rows of each expert.

    Args:
        a_RI: rows [R, I], ordered by expert.
        b_RO: rows [R, O] of the same dtype, in the same order.
        groups: rows of each expert.

    Returns:
        Matrices [e, I, O] of the same dtype; zeros for an expert without rows.
    """
    if _grouped_mm_takes(groups, a_RI, a_RI.shape[1], b_RO.shape[1]):
        return F.grouped_mm(a_RI.T, b_RO, offs=groups.offsets_e)
    if a_RI.shape[0] == 0:
        return a_RI.new_zeros(len(groups.offsets_e), a_RI.shape[1], b_RO.shape[1])
    counts_e = _counts_on_host(groups, a_RI)
    out_eIO = a_RI.new_empty(len(counts_e), a_RI.shape[1], b_RO.shape[1])
    for a, b, out in zip(a_RI.split(counts_e), b_RO.split(counts_e), out_eIO):
        torch.mm(a.T, b, out=out)
    return out_eIO


def homes_and_copies(homes: Tensor, copies: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Parameters of experts at home here, then those of copies, in the dtype of the rows."""
    if copies is None or not len(copies):
        return homes.to(dtype).contiguous()
    return torch.cat([homes.to(dtype), copies.to(dtype)])


def expert_of_rows(groups: Groups, rows: Tensor) -> Tensor:
    """Expert of each row, int64 [R]; padding counts to the last expert."""
    row_R, last = torch.arange(len(rows), device=rows.device, dtype=torch.int32), len(groups.offsets_e) - 1
    return torch.searchsorted(groups.offsets_e, row_R, right=True).clamp_(max=max(last, 0))


def _counts_on_host(groups: Groups, rows: Tensor) -> list[int]:
    """Counts for the loop of products, which must be on the host."""
    assert groups.counts_e is not None, (
        "counts on the device need float32 or bfloat16 and widths of 16 bytes, "
        f"not {rows.dtype} {tuple(rows.shape)}")
    return groups.counts_e


def _grouped_mm_takes(groups: Groups, x_RI: Tensor, *widths: int) -> bool:
    """Whether grouped_mm accepts the operands, and is not itself a loop. It refuses an input without rows."""
    dtype, device = x_RI.dtype, x_RI.device
    if dtype not in (torch.float32, torch.bfloat16) or x_RI.shape[0] == 0 or not _aligned(dtype, *widths):
        return False
    counts_known = groups.counts_e is not None
    return not (counts_known and device.type == "cuda") or takes_counts_on_device(device, dtype, *widths)


def _aligned(dtype: torch.dtype, *widths: int) -> bool:
    return all(width * dtype.itemsize % 16 == 0 for width in widths)


def _reference_wgrad(a_RI: Tensor, b_RO: Tensor, offsets_e: Tensor, acc_eIO: Tensor) -> None:
    wide = acc_eIO.dtype
    acc_eIO += grouped_outer(a_RI.to(wide), b_RO.to(wide), Groups(None, offsets_e))


_wgrad = define(
    "grouped_wgrad_(Tensor a_RI, Tensor b_RO, Tensor offsets_e, Tensor(a!) acc_eIO) -> ()",
    reference=_reference_wgrad,
    fake=lambda *_: None,
)


def grouped_wgrad_(a_RI: Tensor, b_RO: Tensor, offsets_e: Tensor, acc_eIO: Tensor) -> None:
    """Add a.T @ b over the rows of each expert to its matrix, in float32 and in place.

    The model does not call this yet: whether it is faster than grouped_mm and an addition has to be measured
    on a GPU (docs/explanation/kernels.md).

    Args:
        a_RI: rows [R, I], bfloat16 or float32, ordered by expert; I is a multiple of 16 bytes.
        b_RO: rows [R, O] of the same dtype, in the same order; O is a multiple of 16 bytes.
        offsets_e: int32 [e], where the rows of each expert end.
        acc_eIO: float32 [e, I, O], changed in place; the matrix of an expert without rows stays as it is.
    """
    _wgrad(a_RI, b_RO, offsets_e, acc_eIO)
