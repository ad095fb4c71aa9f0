"""Rotary position embedding: pairs of channels of a head turn with the position.

Half-split form: channels i and i + h/2 of a head are rotated together, by the angle position * theta^(-2i/h).

Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding".

Shapes: S positions, h head width.
"""

import torch
from torch import Tensor


def rotary_table(positions: int, head_dim: int, theta: float, *, dtype: torch.dtype, device: torch.device,
                 first: int = 0) -> tuple[Tensor, Tensor]:
    """Compute the cosines and sines of rotary angles, in float64, then cast them.

    Args:
        positions: S.
        head_dim: h.
        theta: base of the frequencies.
        dtype: dtype of the results.
        device: device of the results.
        first: the first position.

    Returns:
        cos and sin, [S, h] each.
    """
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)
    where = torch.arange(first, first + positions, dtype=torch.float64, device=device)
    angles = torch.outer(where, frequencies).repeat(1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the channels of x [..., S, h] by the angles of their positions (`rotary_table`)."""
    return _Rotate.apply(x, *rotary)


class _Rotate(torch.autograd.Function):
    """Rotation whose gradient is the rotation by the negative angle, computed by the same few products."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = x * cos
    turned[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(x[..., :half], sin[..., :half])
    return turned
