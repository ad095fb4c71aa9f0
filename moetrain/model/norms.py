"""Normalization of the channels of a token."""

import torch
from torch import Tensor, nn

from moetrain.ops.rms_norm import rms_norm
from moetrain.ops.start import Start, constant


class RMSNorm(nn.Module):
    """Root-mean-square normalization: x / rms(x) * weight, in the weight's dtype (float32 or better).

    Args:
        dim: size of the last dimension of x.
        eps: added to the mean square before the root.
    """

    def __init__(self, *, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def starts(self) -> dict[str, Start]:
        """How the weight starts."""
        return {"weight": constant(1)}

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
