"""Routed experts over the chunks of a micro-batch, with the gradients of their matrices computed once.

The forward is that of ops/grouped_experts.py, chunk by chunk. In backward, a chunk computes only the
gradients of its rows, which can be sent back at once, and keeps the operands of the matrix gradients. After
the last chunk, these are computed over the rows of all chunks together:

    dW_e = sum over chunks of  a_chunk^T b_chunk  =  a^T b        rows of all chunks ordered by expert

So tensors of the matrices' shape are not added up chunk by chunk, and there is work left to hide the exchange
of the last rows. Until then the gradients of the experts' outputs, the hidden rows and the gradients of the
gate and up halves are kept: D + 3F numbers per row beside its x.

Shapes: as in ops/grouped_experts.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moetrain.ops.grouped_experts import MatrixGradOperands, forward_of, matrix_grads, rows_backward
from moetrain.ops.permute import Permutation
from moetrain.ops.pinned import to_device


class ChunkOperands(NamedTuple):
    """What a chunk's backward keeps for the matrix gradients."""

    operands: MatrixGradOperands
    counts_e: list[int] | Tensor     # rows of each expert in the chunk


class ChunkedExperts:
    """Experts of one micro-batch, called once for each chunk.

    Of the nodes that are ready, autograd runs the one that was recorded last (moe/overlap.py). So the
    constructor is called at that point of forward where backward shall compute the matrix gradients: the
    backward of everything recorded after it runs before them. `weight_grad_barrier` is an input of every
    chunk, so that they also wait for the backward of all chunks.

    Args:
        gate_up_eGD: gate and up matrices of the experts at home here, [e, 2F, D].
        down_eDF: their down matrices, [e, D, F].
        copies: both matrices of copies of other experts, which come after these.
        waited: empty tensor through whose node copies were waited for. That node's backward runs after the
            matrix gradients, also where all matrices are frozen.
    """

    def __init__(self, gate_up_eGD: Tensor, down_eDF: Tensor,
                 copies: tuple[Tensor, Tensor] | None = None, waited: Tensor | None = None) -> None:
        self.matrices = gate_up_eGD, down_eDF, *(copies or (None, None))
        self.chunks: list[ChunkOperands] = []
        self.weight_grad_barrier = _MatrixGrads.apply(self.chunks, waited, *self.matrices)

    def __call__(self, x_ND: Tensor, weights_R: Tensor, counts_e: list[int] | Tensor,
                 order: Permutation) -> Tensor:
        """Compute the weighted outputs of a chunk.

        Args:
            x_ND: rows as they arrived, [N, D].
            weights_R: gate weights [R] in the order of the output, float32 or better.
            counts_e: rows of each expert, copies included; on the host, or int64 on the device.
            order: which arrived row is which expert's row.

        Returns:
            Rows [R, D], ordered by expert.
        """
        return _Chunk.apply(self.chunks, self.weight_grad_barrier, x_ND, order.slots_R, order.rows_TK,
                            weights_R, *self.matrices, counts_e)


class _Chunk(torch.autograd.Function):
    @staticmethod
    def forward(ctx, chunks, weight_grad_barrier, x_ND, slots_R, rows_NK, weights_R, gate_up_eGD, down_eDF,
                gate_up_cGD, down_cDF, counts_e):
        tensors = x_ND, slots_R, rows_NK, weights_R, gate_up_eGD, down_eDF, gate_up_cGD, down_cDF
        out_RD, gate_up_RG = forward_of(counts_e)(*tensors, counts_e)
        ctx.chunks, ctx.counts_e = chunks, counts_e
        ctx.save_for_backward(*tensors, gate_up_RG)
        return out_RD

    @staticmethod
    def backward(ctx, grad_RD):
        rows = rows_backward(grad_RD, *ctx.saved_tensors, ctx.counts_e)
        ctx.chunks.append(ChunkOperands(rows.operands, ctx.counts_e))
        return None, grad_RD.new_zeros(1), rows.x_ND, None, None, rows.weights_R, None, None, None, None, None


class _MatrixGrads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, chunks, waited, gate_up_eGD, down_eDF, gate_up_cGD, down_cDF):
        ctx.waited = None if waited is None else torch.zeros_like(waited)
        ctx.chunks, ctx.homes, ctx.copied = chunks, len(gate_up_eGD), gate_up_cGD is not None
        ctx.dtypes = gate_up_eGD.dtype, down_eDF.dtype
        return gate_up_eGD.new_zeros(1)

    @staticmethod
    def backward(ctx, _):
        grads = matrix_grads_of(ctx.chunks)
        d_gate_up_eGD, d_down_eDF = (grad.to(dtype) for grad, dtype in zip(grads, ctx.dtypes))
        ctx.chunks.clear()
        homes = ctx.homes
        copies = (d_gate_up_eGD[homes:], d_down_eDF[homes:]) if ctx.copied else (None, None)
        return None, ctx.waited, d_gate_up_eGD[:homes], d_down_eDF[:homes], *copies


def matrix_grads_of(chunks: list[ChunkOperands]) -> tuple[Tensor, Tensor]:
    """Gradients of both matrices of all experts over the rows of all chunks, in the dtype of the rows.

    `chunks` is in the order of backward, which runs the last chunk first.
    """
    chunks = chunks[::-1]
    operands, counts = [chunk.operands for chunk in chunks], [chunk.counts_e for chunk in chunks]
    experts = [_expert_of_rows(chunk.counts_e, chunk.operands.grad_RD) for chunk in chunks]
    order_R = torch.cat(experts).argsort(stable=True)
    together = MatrixGradOperands(*(torch.cat(rows).index_select(0, order_R) for rows in zip(*operands)))
    on_device = isinstance(counts[0], Tensor)
    counts_e = torch.stack(counts).sum(0) if on_device else [sum(each) for each in zip(*counts)]
    return matrix_grads(together, counts_e)


def _expert_of_rows(counts_e: list[int] | Tensor, rows_RD: Tensor) -> Tensor:
    """Expert of each row, int64 [R] on the device of the rows."""
    device = rows_RD.device
    if not isinstance(counts_e, Tensor):
        counts_e = to_device(torch.tensor(counts_e, dtype=torch.int64), device)
    return torch.arange(len(counts_e), device=device).repeat_interleave(counts_e, output_size=len(rows_RD))
