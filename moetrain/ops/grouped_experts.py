"""Routed experts of a layer as one op: gather, gate and up, SwiGLU, down.

    rows = x[order];   h = rows gate_up_e^T;   a = silu(h_gate) * h_up * w;   out = a down_e^T

Backward keeps x, the gate weights w and h, nothing else. It gathers the ordered rows again and recomputes `a`
from h. The gradient of w is a product of `a` and its gradient, as in SonicMoE and in Megatron's
memory-efficient permutation, so that no expert output is kept. Parameters are float32 or better and cast
where they are used; the cast is not kept either. Every product over rows is a grouped one, and sums over a
token's rows run in slot order: the result has the same bits in every run. An expert without rows gets
gradients of zeros, never None.

The experts may be in two tensors: those at home here, and copies of others (parallel/fssdp/copies.py). They
are concatenated for the products, and the concatenation is not kept: of the matrices, backward keeps only the
caller's tensors.

Counts are on the host or, as a tensor, on the device. On the device the host waits for nothing, R is a static
bound, and rows behind those of the last expert are padding. Padding may hold anything, NaN included. It
affects no result but the padding of the output, which must not be read; its weights get zero gradients.
Counts on the device need float32 or bfloat16.

Shapes: R rows ordered by expert, N rows as they arrived, K rows per arrived row, e experts on this rank, of
them c copies, D model width, F hidden width, G = 2F.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moetrain.ops.extension import define
from moetrain.ops.grouped_gemm import Groups, grouped_outer, grouped_product, make_groups
from moetrain.ops.permute import Permutation, gather_padded, gather_tokens, sum_padded, sum_slots
from moetrain.ops.swiglu import only_used, swiglu_backward, swiglu_forward


def _reference(x_ND: Tensor, slots_R: Tensor | None, rows_NK: Tensor | None, weights_R: Tensor,
               gate_up_eGD: Tensor, down_eDF: Tensor, gate_up_cGD: Tensor | None, down_cDF: Tensor | None,
               counts_e: list[int] | Tensor) -> tuple[Tensor, Tensor]:
    groups = make_groups(counts_e, x_ND.device)
    rows_RD = _ordered(x_ND, slots_R, rows_NK, groups)
    gate_up_RG = grouped_product(rows_RD, _cast(gate_up_eGD, gate_up_cGD, x_ND.dtype).mT, groups)
    hidden_RF = swiglu_forward(gate_up_RG, weights_R, groups.used)
    return grouped_product(hidden_RF, _cast(down_eDF, down_cDF, x_ND.dtype).mT, groups), gate_up_RG


def _fake(x_ND, slots_R, rows_NK, weights_R, gate_up_eGD, down_eDF, gate_up_cGD, down_cDF, counts_e):
    rows = weights_R.shape[0]
    return x_ND.new_empty(rows, x_ND.shape[1]), x_ND.new_empty(rows, gate_up_eGD.shape[1])


def _reference_backward(grad_RD: Tensor, x_ND: Tensor, slots_R: Tensor | None, rows_NK: Tensor | None,
                        weights_R: Tensor, gate_up_eGD: Tensor, down_eDF: Tensor, gate_up_cGD: Tensor | None,
                        down_cDF: Tensor | None, gate_up_RG: Tensor,
                        counts_e: list[int] | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, of the gate weights, and of both matrices of all experts, copies after homes."""
    rows = rows_backward(grad_RD, x_ND, slots_R, rows_NK, weights_R, gate_up_eGD, down_eDF, gate_up_cGD,
                         down_cDF, gate_up_RG, counts_e)
    d_gate_up_eGD, d_down_eDF = matrix_grads(rows.operands, counts_e)
    return rows.x_ND, rows.weights_R, d_gate_up_eGD.to(gate_up_eGD.dtype), d_down_eDF.to(down_eDF.dtype)


class MatrixGradOperands(NamedTuple):
    """Rows, ordered by expert, whose products are the gradients of the matrices."""

    grad_RD: Tensor              # gradient of the outputs
    hidden_RF: Tensor            # weighted hidden rows
    gate_up_RG: Tensor           # gradient of the gate and up halves
    x_RD: Tensor                 # inputs


class RowsBackward(NamedTuple):
    """Gradients of the rows of the experts' inputs, and the operands of the matrix gradients."""

    x_ND: Tensor
    weights_R: Tensor
    operands: MatrixGradOperands


def rows_backward(grad_RD: Tensor, x_ND: Tensor, slots_R: Tensor | None, rows_NK: Tensor | None,
                  weights_R: Tensor, gate_up_eGD: Tensor, down_eDF: Tensor, gate_up_cGD: Tensor | None,
                  down_cDF: Tensor | None, gate_up_RG: Tensor, counts_e: list[int] | Tensor) -> RowsBackward:
    """Compute the gradients of x and of the gate weights.

    Args:
        grad_RD: gradient of the outputs, [R, D].
        x_ND: rows as they arrived, [N, D].
        slots_R: int64 [R], arrived slot of each expert row; None: x is ordered by expert.
        rows_NK: int64 [N, K], expert rows of each arrived row; None: x is ordered by expert.
        weights_R: gate weights [R].
        gate_up_eGD: gate and up matrices at home here, [e, 2F, D].
        down_eDF: down matrices at home here, [e, D, F].
        gate_up_cGD: gate and up matrices of copies, or None.
        down_cDF: down matrices of copies, or None.
        gate_up_RG: gate and up halves that forward kept, [R, 2F].
        counts_e: rows of each expert, copies included.

    Returns:
        The gradients, and the operands of the matrix gradients.
    """
    groups = make_groups(counts_e, x_ND.device)
    grad_RD = grad_RD.contiguous()                       # that of a sum is expanded: grouped_mm refuses it
    d_hidden_RF = grouped_product(grad_RD, _cast(down_eDF, down_cDF, x_ND.dtype), groups)
    hidden = swiglu_backward(d_hidden_RF, gate_up_RG, weights_R, groups.used)
    d_rows_RD = grouped_product(hidden.gate_up_RG, _cast(gate_up_eGD, gate_up_cGD, x_ND.dtype), groups)
    x_RD = _ordered(x_ND, slots_R, rows_NK, groups)
    operands = MatrixGradOperands(grad_RD, hidden.hidden_RF, hidden.gate_up_RG, x_RD)
    if slots_R is not None:
        d_rows_RD = (sum_slots if groups.used is None else sum_padded)(d_rows_RD, slots_R, rows_NK)
    elif groups.used is not None:
        d_rows_RD = only_used(d_rows_RD, groups.used)    # padding of x gets no gradient
    return RowsBackward(d_rows_RD, hidden.weights_R, operands)


def matrix_grads(operands: MatrixGradOperands, counts_e: list[int] | Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of both matrices of all experts, in the dtype of the rows."""
    grad_RD, hidden_RF, d_gate_up_RG, x_RD = operands
    groups = make_groups(counts_e, x_RD.device)
    return grouped_outer(d_gate_up_RG, x_RD, groups), grouped_outer(grad_RD, hidden_RF, groups)


def _fake_backward(grad_RD, x_ND, slots_R, rows_NK, weights_R, gate_up_eGD, down_eDF, gate_up_cGD, down_cDF,
                   gate_up_RG, counts_e):
    def all_experts(homes: Tensor) -> Tensor:
        return homes.new_empty(len(counts_e), *homes.shape[1:])

    return (torch.empty_like(x_ND, memory_format=torch.contiguous_format), torch.empty_like(weights_R),
            all_experts(gate_up_eGD), all_experts(down_eDF))


def _ordered(x_ND: Tensor, slots_R: Tensor | None, rows_NK: Tensor | None, groups: Groups) -> Tensor:
    """Rows of x ordered by expert."""
    if slots_R is None:
        return x_ND.contiguous()
    return (gather_tokens if groups.used is None else gather_padded)(x_ND, slots_R, rows_NK)


def _cast(homes: Tensor, copies: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Matrices of homes, then of copies, in the dtype of the rows."""
    if copies is None or not len(copies):
        return homes.to(dtype).contiguous()
    return torch.cat([homes.to(dtype), copies.to(dtype)])


def _save(ctx, inputs, output) -> None:
    *tensors, counts_e = inputs
    _, gate_up_RG = output
    ctx.mark_non_differentiable(gate_up_RG)
    ctx.set_materialize_grads(False)                     # no zeros for the gradient of gate_up_RG
    on_device = isinstance(counts_e, Tensor)
    ctx.counts_e = None if on_device else counts_e
    ctx.save_for_backward(*tensors, gate_up_RG, *([counts_e] if on_device else []))


def _gradients(ctx, grad_RD: Tensor | None, _):
    if grad_RD is None:
        return (None,) * 9
    saved = ctx.saved_tensors
    if ctx.counts_e is None:
        grads = _backward_padded(grad_RD, *saved)
    else:
        grads = _backward(grad_RD, *saved, ctx.counts_e)
    d_x_ND, d_weights_R, d_gate_up_eGD, d_down_eDF = grads
    homes, copies = saved[4].shape[0], saved[6]
    if copies is None:
        return d_x_ND, None, None, d_weights_R, d_gate_up_eGD, d_down_eDF, None, None, None
    return (d_x_ND, None, None, d_weights_R, d_gate_up_eGD[:homes], d_down_eDF[:homes], d_gate_up_eGD[homes:],
            d_down_eDF[homes:], None)


_INPUTS = ("Tensor x_ND, Tensor? slots_R, Tensor? rows_NK, Tensor weights_R, Tensor gate_up_eGD, "
           "Tensor down_eDF, Tensor? gate_up_cGD, Tensor? down_cDF")


def _define(suffix: str, counts: str) -> tuple[Callable, Callable]:
    """Define the op and its backward for one form of counts."""
    backward = define(
        f"grouped_experts{suffix}_backward(Tensor grad_RD, {_INPUTS}, Tensor gate_up_RG, {counts})"
        " -> (Tensor, Tensor, Tensor, Tensor)",
        reference=_reference_backward,
        fake=_fake_backward,
    )
    forward = define(
        f"grouped_experts{suffix}({_INPUTS}, {counts}) -> (Tensor, Tensor)",
        reference=_reference,
        fake=_fake,
        backward=_gradients,
        setup_context=_save,
    )
    return forward, backward


_forward, _backward = _define("", "SymInt[] counts_e")
_forward_padded, _backward_padded = _define("_padded", "Tensor counts_e")


def forward_of(counts_e: list[int] | Tensor) -> Callable:
    """Choose the op for this form of counts. It returns outputs, and the gate and up halves for backward."""
    return _forward_padded if isinstance(counts_e, Tensor) else _forward


def grouped_experts(x_ND: Tensor, weights_R: Tensor, gate_up_eGD: Tensor, down_eDF: Tensor,
                    counts_e: list[int] | Tensor, order: Permutation | None = None,
                    copies: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Compute the weighted outputs of the experts. Differentiable in rows, weights and matrices.

    Args:
        x_ND: rows as they arrived, [N, D].
        weights_R: gate weights [R] in the order of the output, float32 or better.
        gate_up_eGD: gate and up matrices [e, 2F, D], float32 or better.
        down_eDF: down matrices [e, D, F], float32 or better.
        counts_e: rows of each expert, copies included. On the host, as a list, they sum to R; on the device,
            as an int64 tensor, to R or less.
        order: which arrived row is which expert's row. Without it, x holds the rows ordered by expert already
            (N = R). With counts on the device it may be padded (ops/route_plan.py).
        copies: both matrices of experts that come after these.

    Returns:
        Rows [R, D] in the dtype of x, ordered by expert.
    """
    slots_R, rows_NK = (None, None) if order is None else (order.slots_R, order.rows_TK)
    gate_up_cGD, down_cDF = copies or (None, None)
    out_RD, _ = forward_of(counts_e)(x_ND, slots_R, rows_NK, weights_R, gate_up_eGD, down_eDF, gate_up_cGD,
                                     down_cDF, counts_e)
    return out_RD
