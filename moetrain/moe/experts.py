"""Feed-forward networks: routed experts over ragged rows, and the dense one for shared experts and dense layers.

    expert(x) = down( silu(gate x) * (up x) * w )        w: the routing weight of the row (1 without routing)

Parameters are float32 (or float64) and cast where they are used.

Shapes: R rows ordered by expert, N rows as they arrived, e experts on this rank, D model width, F hidden width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.moe.bank import ExpertBank
from moetrain.ops.grouped_experts import grouped_experts
from moetrain.ops.permute import Permutation
from moetrain.ops.swiglu import swiglu


class GroupedExperts(nn.Module):
    """The routed experts of one layer, over the bank that holds their weights."""

    def __init__(self, bank: ExpertBank) -> None:
        super().__init__()
        self.bank = bank

    def forward(self, x_ND: Tensor, weights_R: Tensor, counts_e: list[int], order: Permutation | None = None) -> Tensor:
        """Weighted outputs [R, D] ordered by slot, `counts_e` of each on the host. order: ops/grouped_experts.py."""
        bank = self.bank
        if bank.copies is None:
            return grouped_experts(x_ND, weights_R, bank.gate_up, bank.down, counts_e, order)
        x_ND, copies = bank.copies.take(x_ND)
        with bank.copies.saving():
            rows_RD = grouped_experts(x_ND, weights_R, bank.gate_up, bank.down, counts_e, order, copies)
        return bank.copies.leave(rows_RD)


class FeedForward(nn.Module):
    """A dense SwiGLU network; as a shared expert its width is that of all shared experts together."""

    def __init__(self, *, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(2 * hidden_dim, dim))
        self.down = nn.Parameter(torch.empty(dim, hidden_dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(swiglu(F.linear(x, self.gate_up.to(x.dtype))), self.down.to(x.dtype))
