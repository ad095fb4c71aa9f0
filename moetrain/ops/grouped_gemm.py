"""One matrix product per expert over ragged rows.

    grouped_product   out[rows of e] = x[rows of e] @ matrix[e]
    grouped_outer     out[e] = a[rows of e].T @ b[rows of e]          the gradient of a weight

Plain products without autograd: the ops that use them (ops/grouped_experts.py) bring their gradients. float32 and bfloat16
go through `torch.nn.functional.grouped_mm`, which wants row strides that are multiples of 16 bytes and leaves rows past the
last offset uninitialised (there are none here). float64, which it refuses, and odd widths go through the loop, which is
also the reference.

Shapes: R rows ordered by expert, e experts on this rank, I and O widths.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Groups(NamedTuple):
    """Rows of each expert; they sum to R."""

    counts_e: list[int]          # on the host
    offsets_e: Tensor            # int32: where each expert's rows end, on the device of the rows


def make_groups(counts_e: list[int], device: torch.device) -> Groups:
    return Groups(counts_e, torch.tensor(counts_e, dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device))


def grouped_product(x_RI: Tensor, matrix_eIO: Tensor, groups: Groups) -> Tensor:
    """x @ matrix[e], expert by expert: [R, O]. The matrix may be a transposed view."""
    if _grouped_mm_takes(x_RI, *matrix_eIO.shape[1:]):
        return F.grouped_mm(x_RI, matrix_eIO, offs=groups.offsets_e)
    out_RO = x_RI.new_empty(x_RI.shape[0], matrix_eIO.shape[2])
    for rows, matrix, out in zip(x_RI.split(groups.counts_e), matrix_eIO, out_RO.split(groups.counts_e)):
        torch.mm(rows, matrix, out=out)
    return out_RO


def grouped_outer(a_RI: Tensor, b_RO: Tensor, groups: Groups) -> Tensor:
    """a.T @ b over the rows of each expert: [e, I, O]; zeros for an expert without rows."""
    if _grouped_mm_takes(a_RI, a_RI.shape[1], b_RO.shape[1]):
        return F.grouped_mm(a_RI.T, b_RO, offs=groups.offsets_e)
    out_eIO = a_RI.new_empty(len(groups.counts_e), a_RI.shape[1], b_RO.shape[1])
    for a, b, out in zip(a_RI.split(groups.counts_e), b_RO.split(groups.counts_e), out_eIO):
        torch.mm(a.T, b, out=out)
    return out_eIO


def _grouped_mm_takes(x_RI: Tensor, *widths: int) -> bool:
    """No rows at all go through the loop too, which has nothing to multiply."""
    if x_RI.dtype not in (torch.float32, torch.bfloat16) or x_RI.shape[0] == 0:
        return False
    return all(width * x_RI.element_size() % 16 == 0 for width in widths)
