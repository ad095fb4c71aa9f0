"""Feed-forward networks: routed experts over ragged rows, and the dense one for shared experts and dense layers.

    expert(x) = down( silu(gate x) * (up x) * w )        w: the routing weight of the row (1 without routing)

Parameters are float32 (or float64) and cast where they are used.

Shapes: T tokens, K slots per token, R rows ordered by expert, N rows as they arrived, D model width, F hidden width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.moe.bank import ExpertBank
from moetrain.moe.dispatch import Sent
from moetrain.moe.overlap import Output, Pipeline
from moetrain.ops.chunked_experts import ChunkedExperts
from moetrain.ops.grouped_experts import grouped_experts
from moetrain.ops.swiglu import swiglu


class GroupedExperts(nn.Module):
    """The routed experts of one layer, over the bank that holds their weights."""

    def __init__(self, bank: ExpertBank) -> None:
        super().__init__()
        self.bank = bank

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, pipeline: Pipeline) -> Output:
        """Tokens to their experts and back. All of it is inside this module: where the bank is sharded (FSDP2), its weights are
        gathered once, whatever the number of chunks."""
        return pipeline.run(x_TD, ids_TK, weights_TK, Computation(self.bank, pipeline.chunks))


class Computation:
    """A bank's experts over a micro-batch, called once for every chunk.

    Copies of experts are for all chunks: they are waited for before the first, and the last lets go of them.
    """

    def __init__(self, bank: ExpertBank, chunks: int = 1) -> None:
        self.bank, self.left, self.whole = bank, chunks, chunks == 1
        self.chunked: ChunkedExperts | None = None

    def begin(self) -> None:
        """The first chunks are on their way. Of several, backward makes the gradients of weights here: when those of all rows have
        started to return."""
        if self.whole:
            return
        bank, copies = self.bank, None
        if bank.copies is not None:
            _, copies = bank.copies.take(bank.gate_up.new_empty(0))
        self.chunked = ChunkedExperts(bank.gate_up, bank.down, copies)

    def __call__(self, sent: Sent) -> Tensor:
        """Weighted outputs [R, D] ordered by slot."""
        bank, (x_ND, order, weights_R, counts_e, _), copies = self.bank, sent, None
        self.left -= 1
        if bank.copies is None:
            if self.whole:
                return grouped_experts(x_ND, weights_R, bank.gate_up, bank.down, counts_e, order)
            return self.chunked(x_ND, weights_R, counts_e, order)
        if self.whole:
            x_ND, copies = bank.copies.take(x_ND)
        with bank.copies.saving():
            rows_RD = (grouped_experts(x_ND, weights_R, bank.gate_up, bank.down, counts_e, order, copies) if self.whole else
                       self.chunked(x_ND, weights_R, counts_e, order))
        if self.left:
            return rows_RD
        self.chunked = None
        return bank.copies.leave(rows_RD)


class FeedForward(nn.Module):
    """A dense SwiGLU network; as a shared expert its width is that of all shared experts together."""

    def __init__(self, *, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(2 * hidden_dim, dim))
        self.down = nn.Parameter(torch.empty(dim, hidden_dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(swiglu(F.linear(x, self.gate_up.to(x.dtype))), self.down.to(x.dtype))
