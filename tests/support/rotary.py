"""The rotation of rotary position embedding by its formula."""

import torch
from torch import Tensor


def turned(x: Tensor, theta: float = 100.0) -> Tensor:
    """Channels i and i + h/2 as one complex number, times e^(i position angle)."""
    half = x.shape[-1] // 2
    angles = (torch.arange(x.shape[-2], dtype=torch.float64)[:, None]
              * theta ** (-2 * torch.arange(half, dtype=torch.float64) / x.shape[-1]))
    z = (torch.complex(x[..., :half].contiguous(), x[..., half:].contiguous())
         * torch.polar(torch.ones_like(angles), angles))
    return torch.cat([z.real, z.imag], -1)
