"""Root-mean-square normalization as one op.

    y = x / rms(x) * w,   rms(x) = sqrt(mean of x^2 over the last dim + eps)

Backward, with r = 1 / rms and g = dy * w:   dx = r (g - x r^2 mean(g x)),   dw = sum over rows of dy x r

Backward keeps x, w and one number per row. torch's own rms_norm is a chain of operators on the CPU, which
keeps four tensors of the size of x. The op computes in the weight's dtype, float32 or better, and rounds to
that of x.
"""

import torch
from torch import Tensor

from moetrain.ops.extension import define


def _reference(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.to(weight.dtype)
    scale = (torch.linalg.vecdot(wide, wide) / x.shape[-1]).add_(eps).rsqrt_()
    return (wide * scale[..., None]).mul_(weight).to(x.dtype), scale


def _reference_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    wide, grad = x.to(weight.dtype), grad.to(weight.dtype)
    d_weight = scale.flatten() @ (grad * wide).flatten(0, -2)
    d_x = grad * weight
    mean = torch.linalg.vecdot(d_x, wide).mul_(scale.square()).div_(-x.shape[-1])
    return d_x.addcmul_(wide, mean[..., None]).mul_(scale[..., None]).to(x.dtype), d_weight


def _save(ctx, inputs, output) -> None:
    x, weight, _ = inputs
    _, scale = output
    ctx.mark_non_differentiable(scale)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, scale)


def _gradients(ctx, grad: Tensor | None, _):
    return (None, None, None) if grad is None else (*_backward(grad, *ctx.saved_tensors), None)


_backward = define(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor scale) -> (Tensor, Tensor)",
    reference=_reference_backward,
)
_forward = define(
    "rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    reference=_reference,
    backward=_gradients,
    setup_context=_save,
)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalize x over its last dim and scale it.

    Args:
        x: [..., D], any float dtype.
        weight: [D], float32 or better.
        eps: added to the mean square.

    Returns:
        [..., D], in the dtype of x.
    """
    return _forward(x, weight, eps)[0]
