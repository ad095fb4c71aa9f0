"""Occurrences of each id: tokens of an expert, rows of a physical slot or of a destination.

Shapes: N ids, E experts.
"""

import torch
from torch import Tensor


def count_ids(ids: Tensor, num_ids: int) -> Tensor:
    """Count how often each id occurs; -1, an unused slot, counts nowhere.

    Unlike `torch.bincount`, this does not ask a device for the largest id, which would make the host wait.

    Args:
        ids: int64, of any shape, from -1 to num_ids - 1.
        num_ids: E, number of ids.

    Returns:
        int64 [E].
    """
    columns_N = (ids + 1).flatten()                      # column 0 takes the unused slots
    return columns_N.new_zeros(num_ids + 1).scatter_add_(0, columns_N, torch.ones_like(columns_N))[1:]


def load_error_sign(counts_E: Tensor) -> Tensor:
    """Sign of mean(n) - n_i, int64 [..., E]. Computed in integers: 0 for a load that is exactly the mean."""
    return (counts_E.sum(-1, keepdim=True) - counts_E.shape[-1] * counts_E).sign()
