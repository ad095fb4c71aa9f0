"""One matrix product per expert over ragged rows.

    out[rows of e] = x[rows of e] @ weight[e].T

float32 and bfloat16 go through `torch.nn.functional.grouped_mm`, which wants row strides that are multiples of 16 bytes
and leaves rows past the last offset uninitialised (there are none here). float64, which it refuses, and odd widths go
through the loop, which is also the reference.

Shapes: R rows ordered by expert, e experts on this rank, I and O widths.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_linear(x_RI: Tensor, weight_eOI: Tensor, counts_e: list[int]) -> Tensor:
    """x @ weight[e].T, expert by expert: [R, O].

    counts_e: rows of each expert, on the host; they sum to R. An expert without rows gets a zero gradient, never none.
    """
    if sum(counts_e) == 0:
        # Nothing to multiply, yet weights and rows stay in the graph: their gradients are zeros, never None.
        return x_RI @ weight_eOI.sum(0).T
    if _grouped_mm_takes(x_RI, weight_eOI):
        offsets_e = torch.tensor(counts_e, device=x_RI.device).cumsum(0, dtype=torch.int32)
        return F.grouped_mm(x_RI, weight_eOI.transpose(1, 2), offs=offsets_e)
    return grouped_linear_reference(x_RI, weight_eOI, counts_e)


def grouped_linear_reference(x_RI: Tensor, weight_eOI: Tensor, counts_e: list[int]) -> Tensor:
    """The loop over experts."""
    return torch.cat([rows @ weight.T for rows, weight in zip(x_RI.split(counts_e), weight_eOI)])


def _grouped_mm_takes(x_RI: Tensor, weight_eOI: Tensor) -> bool:
    if x_RI.dtype not in (torch.float32, torch.bfloat16):
        return False
    size = x_RI.element_size()
    return all(width * size % 16 == 0 for width in weight_eOI.shape[1:])
