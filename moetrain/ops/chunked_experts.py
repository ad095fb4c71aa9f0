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

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moetrain.ops.grouped_experts import GradOperands, forward_of, matrix_grads, needed_of, rows_backward
from moetrain.ops.grouped_gemm import expert_of_rows, make_groups
from moetrain.ops.permute import Permutation


class ChunkOperands(NamedTuple):
    """What a chunk's backward keeps for the matrix gradients."""

    operands: tuple[GradOperands | None, ...]   # of each matrix
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
                 copies: Sequence[Tensor] | None = None, waited: Tensor | None = None) -> None:
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
        needed = needed_of(ctx.needs_input_grad[2:])
        rows = rows_backward(grad_RD, *ctx.saved_tensors, ctx.counts_e, needed)
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
        grads = [grad if grad is None else grad.to(dtype)
                 for grad, dtype in zip(matrix_grads_of(ctx.chunks), ctx.dtypes)]
        ctx.chunks.clear()
        homes, needs = ctx.homes, ctx.needs_input_grad[2:]
        d_homes = (grad[:homes] if needs[at] else None for at, grad in enumerate(grads))
        d_copies = (grad[homes:] if ctx.copied and needs[2 + at] else None for at, grad in enumerate(grads))
        return None, ctx.waited, *d_homes, *d_copies


def matrix_grads_of(chunks: list[ChunkOperands]) -> tuple[Tensor | None, ...]:
    """Gradients of the matrices of all experts over the rows of all chunks, in the dtype of the rows.

    `chunks` is in the order of backward, which runs the last chunk first. A gradient that is not needed is
    None.
    """
    chunks = chunks[::-1]
    counts = [chunk.counts_e for chunk in chunks]
    on_device = isinstance(counts[0], Tensor)
    counts_e = torch.stack(counts).sum(0) if on_device else [sum(each) for each in zip(*counts)]
    by_matrix = list(zip(*(chunk.operands for chunk in chunks)))
    given = next((pairs for pairs in by_matrix if pairs[0] is not None), None)
    if given is None:
        return (None,) * len(by_matrix)
    order_R = torch.cat([expert_of_rows(make_groups(of_chunk, grad_RO.device), grad_RO)
                         for of_chunk, (grad_RO, _) in zip(counts, given)]).argsort(stable=True)
    return matrix_grads([_in_order(pairs, order_R) for pairs in by_matrix], counts_e)


def _in_order(pairs: tuple[GradOperands | None, ...], order_R: Tensor) -> GradOperands | None:
    """Join the operands of all chunks, with rows in this order; None where there are none."""
    if pairs[0] is None:
        return None
    grad_RO, rows_RI = (torch.cat(rows).index_select(0, order_R) for rows in zip(*pairs))
    return grad_RO, rows_RI
