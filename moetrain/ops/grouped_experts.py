"""Routed experts of a layer as one op: gather, gate and up, SwiGLU, down.

    rows = x[order];   h = rows gate_up_e^T;   a = silu(h_gate) * h_up * w;   out = a down_e^T

Backward keeps x, the gate weights w and h, nothing else. It gathers the ordered rows again and recomputes `a`
from h. The gradient of w is a product of `a` and its gradient, as in SonicMoE and in Megatron's
memory-efficient permutation, so that no expert output is kept. Parameters are float32 or better and cast
where they are used; the cast is not kept either. Every product over rows is a grouped one, and sums over a
token's rows run in slot order: the result has the same bits in every run. An expert without rows gets
gradients of zeros, never None. A gradient that autograd does not ask for, such as that of a frozen matrix, is
not computed.

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

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moetrain.ops.extension import define
from moetrain.ops.grouped_gemm import Groups, grouped_outer, grouped_product, homes_and_copies, make_groups
from moetrain.ops.permute import Permutation, gather_padded, gather_tokens, sum_padded, sum_slots
from moetrain.ops.swiglu import only_used, swiglu_backward, swiglu_forward


def _reference(x_ND: Tensor, slots_R: Tensor | None, rows_NK: Tensor | None, weights_R: Tensor,
               gate_up_eGD: Tensor, down_eDF: Tensor, gate_up_cGD: Tensor | None, down_cDF: Tensor | None,
               counts_e: list[int] | Tensor) -> tuple[Tensor, Tensor]:
    groups = make_groups(counts_e, x_ND.device)
    rows_RD = _ordered(x_ND, slots_R, rows_NK, groups)
    gate_up_RG = grouped_product(rows_RD, homes_and_copies(gate_up_eGD, gate_up_cGD, x_ND.dtype).mT, groups)
    hidden_RF = swiglu_forward(gate_up_RG, weights_R, groups.used)
    out_RD = grouped_product(hidden_RF, homes_and_copies(down_eDF, down_cDF, x_ND.dtype).mT, groups)
    return out_RD, gate_up_RG


def _fake(x_ND, slots_R, rows_NK, weights_R, gate_up_eGD, down_eDF, gate_up_cGD, down_cDF, counts_e):
    rows = weights_R.shape[0]
    return x_ND.new_empty(rows, x_ND.shape[1]), x_ND.new_empty(rows, gate_up_eGD.shape[1])


class Needed(NamedTuple):
    """Which gradients backward shall compute, beside that of the gate weights. The others cost nothing."""

    x: bool
    gate_up: bool
    down: bool


def _reference_backward(grad_RD: Tensor, x_ND: Tensor, slots_R: Tensor | None, rows_NK: Tensor | None,
                        weights_R: Tensor, gate_up_eGD: Tensor, down_eDF: Tensor, gate_up_cGD: Tensor | None,
                        down_cDF: Tensor | None, gate_up_RG: Tensor, counts_e: list[int] | Tensor,
                        needed: list[bool]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, of the gate weights, and of both matrices of all experts, copies after homes.

    A gradient that is not needed is an empty tensor.
    """
    rows = rows_backward(grad_RD, x_ND, slots_R, rows_NK, weights_R, gate_up_eGD, down_eDF, gate_up_cGD,
                         down_cDF, gate_up_RG, counts_e, Needed(*needed))
    d_gate_up_eGD, d_down_eDF = (
        homes.new_empty(0) if grad is None else grad.to(homes.dtype)
        for homes, grad in zip((gate_up_eGD, down_eDF), matrix_grads(rows.operands, counts_e)))
    return (x_ND.new_empty(0) if rows.x_ND is None else rows.x_ND), rows.weights_R, d_gate_up_eGD, d_down_eDF


# Rows, ordered by expert, whose product is the gradient of a matrix: outputs' gradients, and inputs.
GradOperands = tuple[Tensor, Tensor]


class RowsBackward(NamedTuple):
    """Gradients of the rows of the experts' inputs, and the operands of the matrix gradients."""

    x_ND: Tensor | None                                    # None: not needed
    weights_R: Tensor
    operands: tuple[GradOperands | None, GradOperands | None]   # of gate_up and down; None: not needed


def rows_backward(grad_RD: Tensor, x_ND: Tensor, slots_R: Tensor | None, rows_NK: Tensor | None,
                  weights_R: Tensor, gate_up_eGD: Tensor, down_eDF: Tensor, gate_up_cGD: Tensor | None,
                  down_cDF: Tensor | None, gate_up_RG: Tensor, counts_e: list[int] | Tensor,
                  needed: Needed) -> RowsBackward:
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
        needed: which gradients to compute.

    Returns:
        The gradients, and the operands of the matrix gradients.
    """
    groups = make_groups(counts_e, x_ND.device)
    grad_RD = grad_RD.contiguous()                       # that of a sum is expanded: grouped_mm refuses it
    d_hidden_RF = grouped_product(grad_RD, homes_and_copies(down_eDF, down_cDF, x_ND.dtype), groups)
    hidden = swiglu_backward(d_hidden_RF, gate_up_RG, weights_R, groups.used)
    operands = ((hidden.gate_up_RG, _ordered(x_ND, slots_R, rows_NK, groups)) if needed.gate_up else None,
                (grad_RD, hidden.hidden_RF) if needed.down else None)
    if not needed.x:
        return RowsBackward(None, hidden.weights_R, operands)
    d_rows_RD = grouped_product(hidden.gate_up_RG, homes_and_copies(gate_up_eGD, gate_up_cGD, x_ND.dtype),
                                groups)
    if slots_R is not None:
        d_rows_RD = (sum_slots if groups.used is None else sum_padded)(d_rows_RD, slots_R, rows_NK)
    elif groups.used is not None:
        d_rows_RD = only_used(d_rows_RD, groups.used)    # padding of x gets no gradient
    return RowsBackward(d_rows_RD, hidden.weights_R, operands)


def matrix_grads(operands: Sequence[GradOperands | None],
                 counts_e: list[int] | Tensor) -> tuple[Tensor | None, ...]:
    """Compute the gradients of matrices of all experts, in the dtype of the rows; None where not needed."""
    return tuple(pair and grouped_outer(*pair, make_groups(counts_e, pair[0].device)) for pair in operands)


def _fake_backward(grad_RD, x_ND, slots_R, rows_NK, weights_R, gate_up_eGD, down_eDF, gate_up_cGD, down_cDF,
                   gate_up_RG, counts_e, needed):
    def all_experts(homes: Tensor, needed: bool) -> Tensor:
        return homes.new_empty(len(counts_e), *homes.shape[1:]) if needed else homes.new_empty(0)

    of_x, of_gate_up, of_down = needed
    d_x_ND = torch.empty_like(x_ND, memory_format=torch.contiguous_format) if of_x else x_ND.new_empty(0)
    return (d_x_ND, torch.empty_like(weights_R), all_experts(gate_up_eGD, of_gate_up),
            all_experts(down_eDF, of_down))


def _ordered(x_ND: Tensor, slots_R: Tensor | None, rows_NK: Tensor | None, groups: Groups) -> Tensor:
    """Rows of x ordered by expert."""
    if slots_R is None:
        return x_ND.contiguous()
    return (gather_tokens if groups.used is None else gather_padded)(x_ND, slots_R, rows_NK)


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
    saved, needed = ctx.saved_tensors, needed_of(ctx.needs_input_grad)
    if ctx.counts_e is None:
        grads = _backward_padded(grad_RD, *saved, needed)
    else:
        grads = _backward(grad_RD, *saved, ctx.counts_e, needed)
    d_x_ND, d_weights_R, *d_matrices = grads
    homes, copied = saved[4].shape[0], saved[6] is not None
    needs = ctx.needs_input_grad
    # Whole where there are no copies: autograd keeps a gradient as it is, and copies a part of a tensor.
    d_homes = [(d_all[:homes] if copied else d_all) if needs[at] else None
               for at, d_all in zip((4, 5), d_matrices)]
    d_copies = [d_all[homes:] if copied and needs[at] else None for at, d_all in zip((6, 7), d_matrices)]
    return (d_x_ND if needed.x else None), None, None, d_weights_R, *d_homes, *d_copies, None


def needed_of(needs_input_grad: Sequence[bool]) -> Needed:
    """Read from autograd's `needs_input_grad`, in the order of the op's inputs, what backward computes."""
    x, _, _, _, gate_up, down, gate_up_copies, down_copies, _ = needs_input_grad
    return Needed(x, gate_up or gate_up_copies, down or down_copies)


_INPUTS = ("Tensor x_ND, Tensor? slots_R, Tensor? rows_NK, Tensor weights_R, Tensor gate_up_eGD, "
           "Tensor down_eDF, Tensor? gate_up_cGD, Tensor? down_cDF")


def _define(suffix: str, counts: str) -> tuple[Callable, Callable]:
    """Define the op and its backward for one form of counts."""
    backward = define(
        f"grouped_experts{suffix}_backward(Tensor grad_RD, {_INPUTS}, Tensor gate_up_RG, {counts},"
        " bool[] needed)"
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
                    copies: Sequence[Tensor] | None = None) -> Tensor:
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
