"""Feed-forward networks: routed experts over ragged rows, and the dense one for shared experts and dense layers.

    expert(x) = down( silu(gate x) * (up x) * w )        w: the routing weight of the row (1 without routing)

Parameters are float32 (or float64) and cast where they are used.

Shapes: R rows ordered by expert, e experts on this rank, D model width, F hidden width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.moe.bank import ExpertBank
from moetrain.ops.grouped_gemm import grouped_linear
from moetrain.ops.swiglu import swiglu


class GroupedExperts(nn.Module):
    """The routed experts of one layer, over the bank that holds their weights."""

    def __init__(self, bank: ExpertBank) -> None:
        super().__init__()
        self.bank = bank

    def forward(self, rows_RD: Tensor, weights_R: Tensor, counts_e: list[int]) -> Tensor:
        """Weighted outputs [R, D]; rows ordered by expert, `counts_e` of each on the host."""
        gate_up = self.bank.gate_up.to(rows_RD.dtype)
        down = self.bank.down.to(rows_RD.dtype)
        hidden_RF = swiglu(grouped_linear(rows_RD, gate_up, counts_e), weights_R)
        return grouped_linear(hidden_RF, down, counts_e)


class FeedForward(nn.Module):
    """A dense SwiGLU network; as a shared expert its width is that of all shared experts together."""

    def __init__(self, *, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(2 * hidden_dim, dim))
        self.down = nn.Parameter(torch.empty(dim, hidden_dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(swiglu(F.linear(x, self.gate_up.to(x.dtype))), self.down.to(x.dtype))
