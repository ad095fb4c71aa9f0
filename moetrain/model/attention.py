"""Grouped-query causal self-attention with rotary position embedding (model/rotary.py).

The scaled dot product is torch's. With a document mask, attention stays inside each document of a sequence.

Shapes: B sequences, S positions, D model width, H heads, h head width.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.model.norms import RMSNorm
from moetrain.model.projection import Projection
from moetrain.model.rotary import Rotary, rotate
from moetrain.ops.start import Start, residual_normal


class Earlier(Protocol):
    """Interface of one layer's key-value cache, which holds earlier tokens (generate/cache.py)."""

    def extend(self, k_BHSh: Tensor, v_BHSh: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys, already rotated, and values; return those of all tokens so far, [B, H, S, h] each."""


class Cache(Protocol):
    """Interface of a model's key-value cache: `length` earlier tokens, layer by layer."""

    length: int
    layers: list[Earlier]


class Attention(nn.Module):
    """Self-attention of one block.

    The projection `qkv` holds the rows of queries, then keys, then values.

    Args:
        dim: D.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides `num_heads`.
        head_dim: h.
        qk_norm: normalize queries and keys of each head before the rotation.
        eps: of these norms.
    """

    def __init__(self, *, dim: int, num_heads: int, num_kv_heads: int, head_dim: int, qk_norm: bool,
                 eps: float) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.qkv = Projection(in_dim=dim, out_dim=(num_heads + 2 * num_kv_heads) * head_dim)
        self.out = Projection(in_dim=num_heads * head_dim, out_dim=dim)
        self.q_norm = RMSNorm(dim=head_dim, eps=eps) if qk_norm else None
        self.k_norm = RMSNorm(dim=head_dim, eps=eps) if qk_norm else None

    @property
    def cached(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Heads and width of the keys and of the values that a cache keeps of a token."""
        return (self.num_kv_heads, self.head_dim), (self.num_kv_heads, self.head_dim)

    def starts(self) -> dict[str, Start]:
        """How the matrix that writes to the residual stream starts."""
        return {"out.weight": residual_normal(drawn_as="out")}

    def forward(self, x_BSD: Tensor, rotary: Rotary, mask: Tensor | None,
                earlier: Earlier | None = None) -> Tensor:
        """Attend to earlier positions of the same sequence, or document.

        Args:
            x_BSD: [B, S, D], normalized hidden states.
            rotary: cos and sin of the positions.
            mask: bool [B, 1, S, S], True where a query attends to a key; None is causal.
            earlier: the layer's key-value cache, to which the new keys and values are appended. If it is not
                empty, x has one position, the newest.

        Returns:
            [B, S, D], to be added to the residual stream.
        """
        B, S, _ = x_BSD.shape
        heads = self.qkv(x_BSD).view(B, S, -1, self.head_dim).transpose(1, 2)
        qk, v = heads.split([self.num_heads + self.num_kv_heads, self.num_kv_heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk.split([self.num_heads, self.num_kv_heads], dim=1)
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], dim=1)
        q, k = rotate(qk, rotary).split([self.num_heads, self.num_kv_heads], dim=1)
        if earlier is not None:
            k, v = earlier.extend(k, v)
            assert S == 1 or k.shape[2] == S, f"{S} positions at once after {k.shape[2] - S} earlier ones"
        mixed = F.scaled_dot_product_attention(      # a single query, the newest, attends to all keys
            q, k, v, attn_mask=mask, is_causal=mask is None and S > 1,
            enable_gqa=self.num_kv_heads < self.num_heads
        )
        return self.out(mixed.transpose(1, 2).reshape(B, S, -1))


def document_mask(documents_BS: Tensor) -> Tensor:
    """Build the causal attention mask inside documents.

    Args:
        documents_BS: int64 [B, S], document of each position.

    Returns:
        bool [B, 1, S, S], True for a key at the same or an earlier position of the query's document.
    """
    same = documents_BS[:, None, :, None] == documents_BS[:, None, None, :]
    return same & torch.ones_like(same[0, 0]).tril()
