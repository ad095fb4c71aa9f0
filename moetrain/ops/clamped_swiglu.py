"""The activation of GPT-OSS's experts, with the gate weight folded in (moe/clamped_swiglu.py).

    g = min(gate, limit),  u = clip(up, -limit, limit)
    h = g sigmoid(slope g) (u + 1) w                   w: one weight per row

Backward keeps the gate and up halves and w, and recomputes the rest. A half beyond its limit has no gradient;
one at the limit has, as with torch's clamp. Products with the weight are computed in its dtype, float32 or
better, and rounded to that of the rows.

Shapes: R rows, F expert width, G = 2F.
"""

import torch
from torch import Tensor

from moetrain.ops.extension import define


def clamped_swiglu(gate_up_RG: Tensor, weights_R: Tensor, limit: float, slope: float) -> Tensor:
    """Compute the weighted hidden rows. Differentiable in rows and weights.

    Args:
        gate_up_RG: gate and up halves [R, 2F].
        weights_R: weights [R], float32 or better.
        limit: bound of the gate from above, and of the up half in size.
        slope: factor inside the sigmoid.

    Returns:
        Hidden rows [R, F] in the dtype of the halves.
    """
    return _op(gate_up_RG, weights_R, limit, slope)


def _reference(gate_up_RG: Tensor, weights_R: Tensor, limit: float, slope: float) -> Tensor:
    gate_RF, up_RF = gate_up_RG.chunk(2, dim=-1)
    gate_RF = gate_RF.clamp(max=limit)
    hidden_RF = (slope * gate_RF).sigmoid_().mul_(gate_RF).mul_(up_RF.clamp(-limit, limit).add_(1))
    return (hidden_RF * weights_R[:, None]).to(gate_up_RG.dtype)


def _gradients(ctx, grad_RF: Tensor):
    gate_up_RG, weights_R = ctx.saved_tensors
    limit, slope = ctx.limit, ctx.slope
    gate_RF, up_RF = gate_up_RG.chunk(2, dim=-1)
    clamped_RF, raised_RF = gate_RF.clamp(max=limit), up_RF.clamp(-limit, limit) + 1
    share_RF = (slope * clamped_RF).sigmoid()
    active_RF = clamped_RF * share_RF
    hidden_RF = active_RF * raised_RF                    # not weighted yet: dw = <grad, hidden>
    d_weights_R = torch.linalg.vecdot(grad_RF.to(weights_R.dtype), hidden_RF.to(weights_R.dtype))
    grad_RF = (grad_RF * weights_R[:, None]).to(grad_RF.dtype)
    d_gate_RF = grad_RF * raised_RF * share_RF * (1 + slope * clamped_RF * (1 - share_RF))
    d_up_RF = grad_RF * active_RF
    d_gate_up_RG = torch.cat([d_gate_RF.where(gate_RF <= limit, 0),
                              d_up_RF.where(up_RF.abs() <= limit, 0)], dim=-1)
    return d_gate_up_RG, d_weights_R, None, None


def _save(ctx, inputs, output) -> None:
    gate_up_RG, weights_R, ctx.limit, ctx.slope = inputs
    ctx.save_for_backward(gate_up_RG, weights_R)


def _fake(gate_up_RG: Tensor, weights_R: Tensor, limit: float, slope: float) -> Tensor:
    return gate_up_RG.new_empty(gate_up_RG.shape[0], gate_up_RG.shape[1] // 2)


_op = define("clamped_swiglu(Tensor gate_up_RG, Tensor weights_R, float limit, float slope) -> Tensor",
             reference=_reference, fake=_fake, backward=_gradients, setup_context=_save)
