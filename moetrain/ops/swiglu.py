"""SwiGLU with the routing weight folded in before the down projection.

    h = silu(gate) * up * w        gate, up = halves of the last dim;  w one weight a row

Folded here, what an expert returns is already weighted: combining is a plain sum, and the gradient of a weight needs no
expert output. The weight multiplies in its own dtype,
float32 or better, and the result is rounded to the rows' dtype.

`swiglu` is differentiable; `swiglu_forward` and `swiglu_backward` are the same without autograd, for an op that keeps the gate
and up halves alone and makes the hidden rows again (ops/grouped_experts.py). Both may be told how many rows are *used*, by a
number on the device: the others hold whatever the product before left there; they are not read, and get zeros.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.ops.extension import define, kernels_for


def swiglu(gate_up: Tensor, weights_R: Tensor | None = None) -> Tensor:
    """silu(gate) * up [* weight]: [..., 2F] -> [..., F]; weights_R [R] for two-dimensional input."""
    gate, up = gate_up.chunk(2, dim=-1)
    hidden = F.silu(gate) * up
    if weights_R is None:
        return hidden
    return (hidden * weights_R[:, None]).to(gate_up.dtype)


def swiglu_forward(gate_up_RG: Tensor, weights_R: Tensor, used: Tensor | None = None) -> Tensor:
    """`swiglu` with weights, in the memory of its result alone. No gradient. used: int32 [1] on the device."""
    if kernels_for(gate_up_RG):
        return _rows(gate_up_RG, weights_R, used)
    return _reference(gate_up_RG, weights_R, used)


def _reference(gate_up_RG: Tensor, weights_R: Tensor, used: Tensor | None) -> Tensor:
    gate_RF, up_RF = gate_up_RG.chunk(2, dim=-1)
    hidden_RF = F.silu(gate_RF).mul_(up_RF).mul_(weights_R[:, None])
    return hidden_RF if used is None else only_used(hidden_RF, used)


def only_used(rows: Tensor, used: Tensor) -> Tensor:
    """Zeros in the rows that are not used, whatever they hold."""
    live_R = torch.arange(len(rows), device=rows.device) < used
    return rows.where(live_R.view(-1, *[1] * (rows.dim() - 1)), 0)


class SwigluGradients(NamedTuple):
    hidden_RF: Tensor            # the weighted hidden rows, made again
    gate_up_RG: Tensor           # gradient of the gate and up halves
    weights_R: Tensor


def swiglu_backward(grad_RF: Tensor, gate_up_RG: Tensor, weights_R: Tensor, used: Tensor | None = None) -> SwigluGradients:
    """Gradients of `swiglu` with weights. `grad_RF` is used up: its memory serves the intermediate values."""
    if kernels_for(gate_up_RG):
        return SwigluGradients(*_rows_backward(grad_RF, gate_up_RG, weights_R, used))
    return _reference_backward(grad_RF, gate_up_RG, weights_R, used)


def _reference_backward(grad_RF: Tensor, gate_up_RG: Tensor, weights_R: Tensor, used: Tensor | None) -> SwigluGradients:
    gate_RF, up_RF = gate_up_RG.chunk(2, dim=-1)
    d_gate_up_RG = torch.empty_like(gate_up_RG)
    d_gate_RF, d_up_RF = d_gate_up_RG.chunk(2, dim=-1)
    silu_RF = F.silu(gate_RF)
    hidden_RF = silu_RF * up_RF                          # without the weight, whose gradient it is
    d_weights_R = torch.linalg.vecdot(grad_RF.to(weights_R.dtype), hidden_RF.to(weights_R.dtype))
    hidden_RF *= weights_R[:, None]
    grad_RF *= weights_R[:, None]
    torch.mul(grad_RF, silu_RF, out=d_up_RF)
    torch.ops.aten.silu_backward.grad_input(grad_RF.mul_(up_RF), gate_RF, grad_input=d_gate_RF)
    gradients = SwigluGradients(hidden_RF, d_gate_up_RG, d_weights_R)
    return gradients if used is None else SwigluGradients(*(only_used(rows, used) for rows in gradients))


_rows = define("swiglu(Tensor gate_up_RG, Tensor weights_R, Tensor? used) -> Tensor", reference=_reference)
_rows_backward = define(
    "swiglu_backward(Tensor grad_RF, Tensor gate_up_RG, Tensor weights_R, Tensor? used) -> (Tensor, Tensor, Tensor)",
    reference=lambda grad_RF, *rest: tuple(_reference_backward(grad_RF.clone(), *rest)),      # an op takes nothing away
)
