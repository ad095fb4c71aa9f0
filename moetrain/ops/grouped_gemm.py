"""One matrix product per expert over ragged rows.

    grouped_product   out[rows of e] = x[rows of e] @ matrix[e]
    grouped_outer     out[e] = a[rows of e].T @ b[rows of e]          the gradient of a weight
    grouped_wgrad_    acc[e] += the same, products and sums in float32: for gradients that are kept in float32

Plain products without autograd: the ops that use them (ops/grouped_experts.py) bring their gradients. float32 and bfloat16
go through `torch.nn.functional.grouped_mm`, which wants row strides that are multiples of 16 bytes and leaves rows past the
last offset uninitialised (there are none where counts are on the host; where they are on the device nobody reads them).
float64, which it refuses, and odd widths go through the loop, which is also the reference. So do, on a GPU, the dtypes and
chips for which grouped_mm itself is a loop that reads the offsets back, six times a layer and micro-batch: the host knows the
counts already.

Shapes: R rows ordered by expert, e experts on this rank, I and O widths.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.ops.extension import define
from moetrain.ops.pinned import to_device

# Compute capabilities for which grouped_mm is one kernel, in bfloat16 alone (torch 2.11 to 2.13, GroupedBlas.cpp).
ONE_KERNEL = ((9, 0), (10, 0))


class Groups(NamedTuple):
    """Rows of each expert. Counts on the host sum to R; without them the rows behind the last offset are padding."""

    counts_e: list[int] | None   # on the host
    offsets_e: Tensor            # int32: where each expert's rows end, on the device of the rows

    @property
    def used(self) -> Tensor | None:
        """How many rows are not padding, int32 [1] on the device; None where all are not."""
        return self.offsets_e[-1:] if self.counts_e is None else None


def takes_counts_on_device(device: torch.device, dtype: torch.dtype, *widths: int) -> bool:
    """Whether grouped_mm computes with offsets that only the device knows: one kernel, without a wait of the host.

    Args:
        device: of the rows.
        dtype: of rows and matrices.
        widths: of all matrices.
    """
    return (device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) in ONE_KERNEL
            and _aligned(dtype, *widths))


def make_groups(counts_e: list[int] | Tensor, device: torch.device) -> Groups:
    if isinstance(counts_e, Tensor):
        return Groups(None, counts_e.cumsum(0, dtype=torch.int32))
    return Groups(counts_e, to_device(torch.tensor(counts_e, dtype=torch.int32).cumsum(0, dtype=torch.int32), device))


def grouped_product(x_RI: Tensor, matrix_eIO: Tensor, groups: Groups) -> Tensor:
    """x @ matrix[e], expert by expert: [R, O]. The matrix may be a transposed view."""
    if _grouped_mm_takes(groups, x_RI, *matrix_eIO.shape[1:]):
        return F.grouped_mm(x_RI, matrix_eIO, offs=groups.offsets_e)
    if x_RI.shape[0] == 0:
        return x_RI.new_empty(0, matrix_eIO.shape[2])
    _needs_the_host(groups, x_RI)
    out_RO = x_RI.new_empty(x_RI.shape[0], matrix_eIO.shape[2])
    for rows, matrix, out in zip(x_RI.split(groups.counts_e), matrix_eIO, out_RO.split(groups.counts_e)):
        torch.mm(rows, matrix, out=out)
    return out_RO


def grouped_outer(a_RI: Tensor, b_RO: Tensor, groups: Groups) -> Tensor:
    """a.T @ b over the rows of each expert: [e, I, O]; zeros for an expert without rows."""
    if _grouped_mm_takes(groups, a_RI, a_RI.shape[1], b_RO.shape[1]):
        return F.grouped_mm(a_RI.T, b_RO, offs=groups.offsets_e)
    if a_RI.shape[0] == 0:
        return a_RI.new_zeros(len(groups.offsets_e), a_RI.shape[1], b_RO.shape[1])
    _needs_the_host(groups, a_RI)
    out_eIO = a_RI.new_empty(len(groups.counts_e), a_RI.shape[1], b_RO.shape[1])
    for a, b, out in zip(a_RI.split(groups.counts_e), b_RO.split(groups.counts_e), out_eIO):
        torch.mm(a.T, b, out=out)
    return out_eIO


def _needs_the_host(groups: Groups, rows: Tensor) -> None:
    assert groups.counts_e is not None, (
        f"counts on the device need float32 or bfloat16 and widths of 16 bytes, not {rows.dtype} {tuple(rows.shape)}")


def _grouped_mm_takes(groups: Groups, x_RI: Tensor, *widths: int) -> bool:
    """Whether grouped_mm computes it (it refuses no rows at all), and no slower than the loop."""
    if x_RI.dtype not in (torch.float32, torch.bfloat16) or x_RI.shape[0] == 0 or not _aligned(x_RI.dtype, *widths):
        return False
    counts_known = groups.counts_e is not None
    return not (counts_known and x_RI.device.type == "cuda") or takes_counts_on_device(x_RI.device, x_RI.dtype, *widths)


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
    """acc[e] += a.T @ b over the rows of each expert, in float32, in place. offsets_e: int32, where each expert's rows end.

    Widths are multiples of 16 bytes. An expert without rows leaves its matrix as it was. Nothing of the model calls this
    yet: whether it beats grouped_mm and an addition is for a GPU to say (docs/explanation/kernels.md).
    """
    _wgrad(a_RI, b_RO, offsets_e, acc_eIO)
