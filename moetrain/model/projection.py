"""Linear map of attention and feed-forward networks, with places for a bias and a low-rank part.

    y = W x + b + scale * B (A x)

Bias and low-rank part are optional. `convert_model` (model/build.py) adds them before the model is sharded;
tensors that require no gradient get none, so a frozen W trains A and B alone. Parameters are float32 (or
float64) and cast to the dtype of x where they are used.

Nothing is added in place: activation checkpointing keeps the results of matrix products.

Shapes: I inputs, O outputs, r rank of the low-rank part.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.ops.start import Start, constant, normal


class Projection(nn.Module):
    """Linear map from `in_dim` to `out_dim`.

    Args:
        in_dim: I.
        out_dim: O.
        bias: whether a bias is added.
    """

    def __init__(self, *, in_dim: int, out_dim: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim))
        self.bias = nn.Parameter(torch.empty(out_dim)) if bias else None
        self.low_rank: LowRank | None = None

    def starts(self) -> dict[str, Start]:
        """How matrix and bias start. The matrix is drawn by the name of the projection."""
        return {"weight": normal(drawn_as="")} | ({} if self.bias is None else {"bias": constant(0)})

    def add_low_rank(self, rank: int, scale: float = 1.0) -> None:
        """Add a low-rank part, which is 0 at first: its B starts at 0, its A at random."""
        out_dim, in_dim = self.weight.shape
        self.low_rank = LowRank(in_dim=in_dim, out_dim=out_dim, rank=rank, scale=scale)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., I] to [..., O]."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = F.linear(x, self.weight.to(x.dtype), bias)
        return y if self.low_rank is None else y + self.low_rank(x)


class LowRank(nn.Module):
    """Low-rank part of a linear map: scale * B (A x).

    Args:
        in_dim: I.
        out_dim: O.
        rank: r.
        scale: factor of the result.
    """

    def __init__(self, *, in_dim: int, out_dim: int, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.a = nn.Parameter(torch.empty(rank, in_dim))
        self.b = nn.Parameter(torch.empty(out_dim, rank))

    def starts(self) -> dict[str, Start]:
        """How the matrices start: B at 0."""
        return {"a": normal(), "b": constant(0)}

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., I] to [..., O]."""
        return self.scale * F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))
