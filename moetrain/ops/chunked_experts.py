"""The routed experts over the chunks of a pipeline: gradients of their weights once, after those of all rows.

What ops/grouped_experts.py computes, chunk by chunk. Backward a chunk makes the gradients of its rows alone, which can be on their
way at once, and leaves what the gradients of weights are made of; when the last chunk has been by, they are made over the rows of all
chunks together:

    dW_e = sum over chunks of  a_chunk^T b_chunk  =  a^T b        rows of all chunks ordered by expert

So products with weights' shape are not added up chunk by chunk, and something is left to compute while the last rows return. Meanwhile
the gradients of the experts' outputs, of the hidden rows and of the gate and up halves are kept: D + 3F numbers a row.

Shapes: as in ops/grouped_experts.py; c chunks.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moetrain.ops.grouped_experts import Factors, forward_of, rows_backward, weights_backward
from moetrain.ops.permute import Permutation
from moetrain.ops.pinned import to_device


class Part(NamedTuple):
    """What a chunk leaves."""

    factors: Factors
    counts_e: list[int] | Tensor


class ChunkedExperts:
    """The experts of a micro-batch. Made where, backward, the gradients of weights are to be made: what is recorded after it runs
    before. copies: as for `grouped_experts`."""

    def __init__(self, gate_up_eGD: Tensor, down_eDF: Tensor, copies: tuple[Tensor, Tensor] | None = None) -> None:
        self.matrices = gate_up_eGD, down_eDF, *(copies or (None, None))
        self.parts: list[Part] = []
        self.weight_grad_barrier = _Weights.apply(self.parts, *self.matrices)          # every chunk passes by, backward before it

    def __call__(self, x_ND: Tensor, weights_R: Tensor, counts_e: list[int] | Tensor, order: Permutation) -> Tensor:
        """Weighted outputs of a chunk, [R, D] ordered by expert."""
        return _Chunk.apply(self.parts, self.weight_grad_barrier, x_ND, order.slots_R, order.rows_TK, weights_R, *self.matrices, counts_e)


class _Chunk(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parts, weight_grad_barrier, x_ND, slots_R, rows_NK, weights_R, gate_up_eGD, down_eDF, gate_up_cGD, down_cDF, counts_e):
        tensors = x_ND, slots_R, rows_NK, weights_R, gate_up_eGD, down_eDF, gate_up_cGD, down_cDF
        out_RD, gate_up_RG = forward_of(counts_e)(*tensors, counts_e)
        ctx.parts, ctx.counts_e = parts, counts_e
        ctx.save_for_backward(*tensors, gate_up_RG)
        return out_RD

    @staticmethod
    def backward(ctx, grad_RD):
        rows = rows_backward(grad_RD, *ctx.saved_tensors, ctx.counts_e)
        ctx.parts.append(Part(rows.factors, ctx.counts_e))
        return None, grad_RD.new_zeros(1), rows.x_ND, None, None, rows.weights_R, None, None, None, None, None


class _Weights(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parts, gate_up_eGD, down_eDF, gate_up_cGD, down_cDF):
        ctx.parts, ctx.homes, ctx.copied = parts, len(gate_up_eGD), gate_up_cGD is not None
        ctx.dtypes = gate_up_eGD.dtype, down_eDF.dtype
        return gate_up_eGD.new_zeros(1)

    @staticmethod
    def backward(ctx, _):
        d_gate_up_eGD, d_down_eDF = (grad.to(dtype) for grad, dtype in zip(weights_of(ctx.parts), ctx.dtypes))
        ctx.parts.clear()
        homes = ctx.homes
        copies = (d_gate_up_eGD[homes:], d_down_eDF[homes:]) if ctx.copied else (None, None)
        return None, d_gate_up_eGD[:homes], d_down_eDF[:homes], *copies


def weights_of(parts: list[Part]) -> tuple[Tensor, Tensor]:
    """Gradients of both matrices of all experts over the rows of all chunks."""
    parts = parts[::-1]                                  # backward came by the last chunk first
    counts = [part.counts_e for part in parts]
    on_device = isinstance(counts[0], Tensor)
    labels = [_labels(part.counts_e, len(part.factors.grad_RD), part.factors.grad_RD.device) for part in parts]
    order_R = torch.cat(labels).argsort(stable=True)
    together = Factors(*(torch.cat(chunks).index_select(0, order_R) for chunks in zip(*(part.factors for part in parts))))
    return weights_backward(together, torch.stack(counts).sum(0) if on_device else [sum(each) for each in zip(*counts)])


def _labels(counts_e: list[int] | Tensor, rows: int, device: torch.device) -> Tensor:
    """The expert of every row."""
    counts = counts_e if isinstance(counts_e, Tensor) else to_device(torch.tensor(counts_e, dtype=torch.int64), device)
    return torch.arange(len(counts), device=device).repeat_interleave(counts, output_size=rows)
