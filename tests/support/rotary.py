"""The rotation of rotary position embedding by its formula, and small tables of angles."""

import torch
from torch import Tensor

from moetrain.model.rotary import Rotary, RotaryEmbedding


def table(positions: int, width: int, theta: float = 100.0, first: int = 0,
          dtype: torch.dtype = torch.float64, **options) -> Rotary:
    embedding = RotaryEmbedding(width=width, theta=theta, **options)
    return embedding.table(positions, dtype=dtype, device=torch.device("cpu"), first=first)


def turned(x: Tensor, theta: float = 100.0) -> Tensor:
    """Channels i and i + h/2 as one complex number, times e^(i position angle)."""
    half = x.shape[-1] // 2
    angles = (torch.arange(x.shape[-2], dtype=torch.float64)[:, None]
              * theta ** (-2 * torch.arange(half, dtype=torch.float64) / x.shape[-1]))
    z = (torch.complex(x[..., :half].contiguous(), x[..., half:].contiguous())
         * torch.polar(torch.ones_like(angles), angles))
    return torch.cat([z.real, z.imag], -1)
