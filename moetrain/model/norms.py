"""Normalization of the channels of a token.

    rms      x / rms(x) * weight,   rms(x) = sqrt(mean of x^2 + eps)
    layer    (x - mean(x)) / sqrt(variance of x + eps) * weight + bias

Both are computed in the dtype of their parameters, float32 or better, and rounded to that of x. Zhang and
Sennrich 2019, "Root Mean Square Layer Normalization"; Ba et al. 2016, "Layer Normalization".
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.ops.rms_norm import rms_norm
from moetrain.ops.start import Start, constant


class RMSNorm(nn.Module):
    """Root-mean-square normalization.

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


class LayerNorm(nn.Module):
    """Layer normalization with a bias.

    Args:
        dim: size of the last dimension of x.
        eps: added to the variance before the root.
    """

    def __init__(self, *, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim))

    def starts(self) -> dict[str, Start]:
        """How weight and bias start."""
        return {"weight": constant(1), "bias": constant(0)}

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(self.weight.dtype)
        return F.layer_norm(wide, self.weight.shape, self.weight, self.bias, self.eps).to(x.dtype)


# Norms of blocks and of the head's input, by the values of `model.norm`.
NORMS: dict[str, type[RMSNorm] | type[LayerNorm]] = {"rms": RMSNorm, "layer": LayerNorm}
