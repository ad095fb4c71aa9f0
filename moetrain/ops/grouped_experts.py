"""The routed experts of a layer as one op: gather, gate and up, SwiGLU, down.

    rows = x[order];   h = rows gate_up_e^T;   a = silu(h_gate) * h_up * w;   out = a down_e^T

Backward it keeps x, the weights and h, nothing else: the ordered rows are gathered again and `a` is made again from h
(SonicMoE and Megatron's memory-efficient permutation read the gradient of w off a and its gradient too, so that no
expert output is kept). Parameters are float32 or better and cast where they are used; the cast copy is not kept either.
Every product over rows is a grouped one, and sums over a token's rows run in slot order: the result is the same to the
last bit from run to run. An expert without rows gets gradients of zeros, never none.

The experts may lie in two places, those at home here and copies of others (parallel/fssdp/copies.py). They are laid side by side
for the products and not kept so: what is kept of the weights is what the caller holds anyway.

Counts may be on the host or, as a tensor, on the device: then nothing waits for the host, R is a static bound, and rows behind
the last expert's are padding. Padding may hold anything, NaN included, and reaches no result but padding of the output, which
nobody may read; its weights get gradients of zero. (On the device only: float32 and bfloat16.)

Shapes: R rows ordered by expert, N rows as they arrived, K rows per arrived row, e experts on this rank, of them c copies,
D model width, F hidden width, G = 2F.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moetrain.ops.extension import define
from moetrain.ops.grouped_gemm import Groups, grouped_outer, grouped_product, make_groups
from moetrain.ops.permute import Permutation, gather_padded, gather_tokens, sum_padded, sum_slots
from moetrain.ops.swiglu import only_used, swiglu_backward, swiglu_forward


def _reference(x_ND: Tensor, slots_R: Tensor | None, rows_NK: Tensor | None, weights_R: Tensor, gate_up_eGD: Tensor,
               down_eDF: Tensor, gate_up_cGD: Tensor | None, down_cDF: Tensor | None,
               counts_e: list[int] | Tensor) -> tuple[Tensor, Tensor]:
    groups = make_groups(counts_e, x_ND.device)
    rows_RD = _ordered(x_ND, slots_R, rows_NK, groups)
    gate_up_RG = grouped_product(rows_RD, _cast(gate_up_eGD, gate_up_cGD, x_ND.dtype).mT, groups)
    hidden_RF = swiglu_forward(gate_up_RG, weights_R, groups.used)
    return grouped_product(hidden_RF, _cast(down_eDF, down_cDF, x_ND.dtype).mT, groups), gate_up_RG


def _fake(x_ND, slots_R, rows_NK, weights_R, gate_up_eGD, down_eDF, gate_up_cGD, down_cDF, counts_e):
    rows = weights_R.shape[0]
    return x_ND.new_empty(rows, x_ND.shape[1]), x_ND.new_empty(rows, gate_up_eGD.shape[1])


def _reference_backward(grad_RD: Tensor, x_ND: Tensor, slots_R: Tensor | None, rows_NK: Tensor | None, weights_R: Tensor,
                        gate_up_eGD: Tensor, down_eDF: Tensor, gate_up_cGD: Tensor | None, down_cDF: Tensor | None,
                        gate_up_RG: Tensor, counts_e: list[int] | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, the weights, and both matrices of all experts, copies after homes."""
    rows = rows_backward(grad_RD, x_ND, slots_R, rows_NK, weights_R, gate_up_eGD, down_eDF, gate_up_cGD, down_cDF, gate_up_RG,
                         counts_e)
    d_gate_up_eGD, d_down_eDF = weights_backward(rows.factors, counts_e)
    return rows.x_ND, rows.weights_R, d_gate_up_eGD.to(gate_up_eGD.dtype), d_down_eDF.to(down_eDF.dtype)


class Factors(NamedTuple):
    """Rows whose products are the gradients of the matrices."""

    grad_RD: Tensor
    hidden_RF: Tensor
    gate_up_RG: Tensor           # gradient
    x_RD: Tensor


class RowsBackward(NamedTuple):
    x_ND: Tensor
    weights_R: Tensor
    factors: Factors


def rows_backward(grad_RD: Tensor, x_ND: Tensor, slots_R: Tensor | None, rows_NK: Tensor | None, weights_R: Tensor,
                  gate_up_eGD: Tensor, down_eDF: Tensor, gate_up_cGD: Tensor | None, down_cDF: Tensor | None, gate_up_RG: Tensor,
                  counts_e: list[int] | Tensor) -> RowsBackward:
    """Gradients of x and of the weights of rows, and what those of the matrices are made of."""
    groups = make_groups(counts_e, x_ND.device)
    grad_RD = grad_RD.contiguous()                       # a sum hands in an expanded one, which grouped_mm refuses
    d_hidden_RF = grouped_product(grad_RD, _cast(down_eDF, down_cDF, x_ND.dtype), groups)
    hidden = swiglu_backward(d_hidden_RF, gate_up_RG, weights_R, groups.used)
    d_rows_RD = grouped_product(hidden.gate_up_RG, _cast(gate_up_eGD, gate_up_cGD, x_ND.dtype), groups)
    factors = Factors(grad_RD, hidden.hidden_RF, hidden.gate_up_RG, _ordered(x_ND, slots_R, rows_NK, groups))
    if slots_R is not None:
        d_rows_RD = (sum_slots if groups.used is None else sum_padded)(d_rows_RD, slots_R, rows_NK)
    elif groups.used is not None:
        d_rows_RD = only_used(d_rows_RD, groups.used)    # padding of x gets no gradient
    return RowsBackward(d_rows_RD, hidden.weights_R, factors)


def weights_backward(factors: Factors, counts_e: list[int] | Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of both matrices of all experts, in the dtype of the rows."""
    groups = make_groups(counts_e, factors.x_RD.device)
    return grouped_outer(factors.gate_up_RG, factors.x_RD, groups), grouped_outer(factors.grad_RD, factors.hidden_RF, groups)


def _fake_backward(grad_RD, x_ND, slots_R, rows_NK, weights_R, gate_up_eGD, down_eDF, gate_up_cGD, down_cDF, gate_up_RG,
                   counts_e):
    def all_experts(homes: Tensor) -> Tensor:
        return homes.new_empty(len(counts_e), *homes.shape[1:])

    return (torch.empty_like(x_ND, memory_format=torch.contiguous_format), torch.empty_like(weights_R),
            all_experts(gate_up_eGD), all_experts(down_eDF))


def _ordered(x_ND: Tensor, slots_R: Tensor | None, rows_NK: Tensor | None, groups: Groups) -> Tensor:
    if slots_R is None:
        return x_ND.contiguous()
    return (gather_tokens if groups.used is None else gather_padded)(x_ND, slots_R, rows_NK)


def _cast(homes: Tensor, copies: Tensor | None, dtype: torch.dtype) -> Tensor:
    if copies is None or not len(copies):
        return homes.to(dtype).contiguous()
    return torch.cat([homes.to(dtype), copies.to(dtype)])


def _save(ctx, inputs, output) -> None:
    *tensors, counts_e = inputs
    _, gate_up_RG = output
    ctx.mark_non_differentiable(gate_up_RG)
    ctx.set_materialize_grads(False)                     # no zeros for gate_up_RG
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


_INPUTS = ("Tensor x_ND, Tensor? slots_R, Tensor? rows_NK, Tensor weights_R, Tensor gate_up_eGD, Tensor down_eDF, "
           "Tensor? gate_up_cGD, Tensor? down_cDF")


def _define(suffix: str, counts: str) -> tuple[Callable, Callable]:
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
    """The op: outputs, and the gate and up halves that backward keeps."""
    return _forward_padded if isinstance(counts_e, Tensor) else _forward


def grouped_experts(x_ND: Tensor, weights_R: Tensor, gate_up_eGD: Tensor, down_eDF: Tensor, counts_e: list[int] | Tensor,
                    order: Permutation | None = None, copies: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Weighted outputs of the experts, [R, D] ordered by expert.

    counts_e: rows of each expert. On the host they sum to R; on the device, as a tensor of whole numbers, to R or less.
    order: which arrived row is which expert's row; without it x holds the rows ordered by expert already (N = R); with counts
    on the device it may be padded (ops/route_plan.py). weights_R: in the order of the output, float32 or better.
    copies: both matrices of experts that come after these; counts_e and rows then go on with theirs.
    """
    slots_R, rows_NK = (None, None) if order is None else (order.slots_R, order.rows_TK)
    gate_up_cGD, down_cDF = copies or (None, None)
    out_RD, _ = forward_of(counts_e)(x_ND, slots_R, rows_NK, weights_R, gate_up_eGD, down_eDF, gate_up_cGD, down_cDF, counts_e)
    return out_RD
