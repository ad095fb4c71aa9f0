"""SwiGLU, with the gate weight folded in before the down projection.

    h = silu(gate) * up * w        gate, up = halves of the last dim;  w: one weight per row

With the weight folded in here, the outputs of experts are already weighted: combine is a plain sum, and the
gradient of a weight needs no expert output. The product with the weight is computed in the weight's dtype,
float32 or better, and rounded to the rows' dtype.

`swiglu` is differentiable. `swiglu_forward` and `swiglu_backward` are the same without autograd, for an op
that keeps only the gate and up halves and recomputes the hidden rows (ops/grouped_experts.py). Both accept
the number of *used* rows, on the device: the rows behind them hold what the matrix product before left there.
They are not read, and their results are zeros.

Shapes: R rows, F expert width, G = 2F.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.ops.extension import define, kernels_for


def swiglu(gate_up: Tensor, weights_R: Tensor | None = None) -> Tensor:
    """Compute silu(gate) * up, times a weight per row if there are weights: [..., 2F] -> [..., F].

    Weights [R] need two-dimensional input. Differentiable.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    hidden = F.silu(gate) * up
    if weights_R is None:
        return hidden
    return (hidden * weights_R[:, None]).to(gate_up.dtype)


def swiglu_forward(gate_up_RG: Tensor, weights_R: Tensor, used: Tensor | None = None) -> Tensor:
    """Compute `swiglu` with weights in no memory but that of its result. No gradient.

    Args:
        gate_up_RG: gate and up halves [R, 2F].
        weights_R: weights [R], float32 or better.
        used: int32 [1] on the device, number of used rows; None: all.

    Returns:
        Hidden rows [R, F]; zeros in rows that are not used.
    """
    if kernels_for(gate_up_RG):
        return _rows(gate_up_RG, weights_R, used)
    return _reference(gate_up_RG, weights_R, used)


def _reference(gate_up_RG: Tensor, weights_R: Tensor, used: Tensor | None) -> Tensor:
    gate_RF, up_RF = gate_up_RG.chunk(2, dim=-1)
    hidden_RF = F.silu(gate_RF).mul_(up_RF).mul_(weights_R[:, None])
    return hidden_RF if used is None else only_used(hidden_RF, used)


def only_used(rows: Tensor, used: Tensor) -> Tensor:
    """Set the rows that are not used to zero, whatever they hold. used: int32 [1] on the device."""
    live_R = torch.arange(len(rows), device=rows.device) < used
    return rows.where(live_R.view(-1, *[1] * (rows.dim() - 1)), 0)


class SwigluGradients(NamedTuple):
    """Results of `swiglu_backward`."""

    hidden_RF: Tensor            # the weighted hidden rows, recomputed
    gate_up_RG: Tensor           # gradient of the gate and up halves
    weights_R: Tensor


def swiglu_backward(grad_RF: Tensor, gate_up_RG: Tensor, weights_R: Tensor,
                    used: Tensor | None = None) -> SwigluGradients:
    """Compute the gradients of `swiglu` with weights.

    Args:
        grad_RF: gradient of the hidden rows [R, F]; overwritten with intermediate values.
        gate_up_RG: gate and up halves [R, 2F].
        weights_R: weights [R], float32 or better.
        used: int32 [1] on the device, number of used rows; None: all.

    Returns:
        Hidden rows and gradients; zeros in rows that are not used.
    """
    if kernels_for(gate_up_RG):
        return SwigluGradients(*_rows_backward(grad_RF, gate_up_RG, weights_R, used))
    return _reference_backward(grad_RF, gate_up_RG, weights_R, used)


def _reference_backward(grad_RF: Tensor, gate_up_RG: Tensor, weights_R: Tensor,
                        used: Tensor | None) -> SwigluGradients:
    gate_RF, up_RF = gate_up_RG.chunk(2, dim=-1)
    d_gate_up_RG = torch.empty_like(gate_up_RG)
    d_gate_RF, d_up_RF = d_gate_up_RG.chunk(2, dim=-1)
    silu_RF = F.silu(gate_RF)
    hidden_RF = silu_RF * up_RF                          # not weighted yet: dw = <grad, hidden>
    d_weights_R = torch.linalg.vecdot(grad_RF.to(weights_R.dtype), hidden_RF.to(weights_R.dtype))
    hidden_RF *= weights_R[:, None]
    grad_RF *= weights_R[:, None]
    torch.mul(grad_RF, silu_RF, out=d_up_RF)
    torch.ops.aten.silu_backward.grad_input(grad_RF.mul_(up_RF), gate_RF, grad_input=d_gate_RF)
    gradients = SwigluGradients(hidden_RF, d_gate_up_RG, d_weights_R)
    return gradients if used is None else SwigluGradients(*(only_used(rows, used) for rows in gradients))


_rows = define("swiglu(Tensor gate_up_RG, Tensor weights_R, Tensor? used) -> Tensor", reference=_reference)
_rows_backward = define(
    "swiglu_backward(Tensor grad_RF, Tensor gate_up_RG, Tensor weights_R, Tensor? used)"
    " -> (Tensor, Tensor, Tensor)",
    # The op's schema declares no argument as changed, so the reference gets a copy of the gradient.
    reference=lambda grad_RF, *rest: tuple(_reference_backward(grad_RF.clone(), *rest)),
)
