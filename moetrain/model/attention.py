"""Grouped-query causal self-attention with rotary position embedding (model/rotary.py).

    q, k, v = W_q x + b_q, W_k x + b_k, W_v x + b_v        biases: Qwen2, GLM-4.5; b_o, too: GPT-OSS, Phi
    q, k    = norm(q), norm(k)                             of each head (Qwen3), or of all together (OLMoE)
    q, k, v = clip(q), clip(k), clip(v)                    to +-clip (OLMoE, MPT)
    a       = softmax(scale rot(q) rot(k)^T)               over keys at most `window` - 1 positions back
    y       = W_o (a v) + b_o

The scaled dot product is torch's. With a document mask, attention stays inside each document of a sequence.

A sink (GPT-OSS; Xiao et al. 2023, arXiv 2309.17453) is a learned logit of each head, which takes part in the
softmax and whose probability is dropped:

    a_j = exp(z_j) / (exp(s) + sum_i exp(z_i))

Here it is one more key, whose value is 0. Queries get a channel that holds s / scale, which is 1 in that key
and 0 in the others, so the product is s and any kernel computes it.

Shapes: B sequences, S positions, L keys, D model width, H heads, h head width.
"""

from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.model.norms import RMSNorm
from moetrain.model.projection import Projection
from moetrain.model.rotary import Rotary, rotate
from moetrain.ops.start import Start, constant, residual_normal

_ALIGNED = 8                                         # channels that a sink adds to a head


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
        qk_norm: normalize queries and keys before the rotation: none, each head, or all heads together.
        eps: of these norms.
        bias: which projections have a bias: none, qkv, or all, the last one, too.
        clip: largest absolute value of queries, keys and values; None does not clip.
        sinks: whether every head has a sink.
        window: keys that a query attends to at most, its own included; None: all before it.
        scale: factor of the products of queries and keys; None: 1 / sqrt(h).
    """

    def __init__(self, *, dim: int, num_heads: int, num_kv_heads: int, head_dim: int, eps: float,
                 qk_norm: Literal["none", "head", "all"] = "none",
                 bias: Literal["none", "qkv", "all"] = "none", clip: float | None = None,
                 sinks: bool = False, window: int | None = None, scale: float | None = None) -> None:
        super().__init__()
        assert qk_norm in ("none", "head", "all") and bias in ("none", "qkv", "all"), (qk_norm, bias)
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.qk_norm, self.clip, self.window = qk_norm, clip, window
        self.scale = head_dim ** -0.5 if sinks and scale is None else scale
        self.qkv = Projection(in_dim=dim, out_dim=(num_heads + 2 * num_kv_heads) * head_dim,
                              bias=bias != "none")
        self.out = Projection(in_dim=num_heads * head_dim, out_dim=dim, bias=bias == "all")
        q_width, k_width = ((head_dim, head_dim) if qk_norm == "head" else
                            (num_heads * head_dim, num_kv_heads * head_dim))
        self.q_norm = None if qk_norm == "none" else RMSNorm(dim=q_width, eps=eps)
        self.k_norm = None if qk_norm == "none" else RMSNorm(dim=k_width, eps=eps)
        self.sinks = nn.Parameter(torch.empty(num_heads)) if sinks else None

    @property
    def cached(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Heads and width of the keys and of the values that a cache keeps of a token."""
        return (self.num_kv_heads, self.head_dim), (self.num_kv_heads, self.head_dim)

    def starts(self) -> dict[str, Start]:
        """How the matrix that writes to the residual stream starts, and sinks: as a key of product 0."""
        return {"out.weight": residual_normal(drawn_as="out")} | (
            {} if self.sinks is None else {"sinks": constant(0)})

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
        heads = self._projected(x_BSD).view(B, S, -1, self.head_dim).transpose(1, 2)
        qk, v = heads.split([self.num_heads + self.num_kv_heads, self.num_kv_heads], dim=1)
        if self.qk_norm == "head" and self.q_norm is not None and self.k_norm is not None:
            q, k = qk.split([self.num_heads, self.num_kv_heads], dim=1)
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], dim=1)
        q, k = rotate(qk, rotary).split([self.num_heads, self.num_kv_heads], dim=1)
        if earlier is not None:
            k, v = earlier.extend(k, v)
            assert S == 1 or k.shape[2] == S, f"{S} positions at once after {k.shape[2] - S} earlier ones"
        if self.window is not None and self.window < k.shape[2]:
            if S == 1:                               # a single query, the newest, attends to the newest keys
                k, v = k[:, :, -self.window:], v[:, :, -self.window:]
            else:
                inside = window_mask(S, self.window, x_BSD.device)
                mask = inside if mask is None else mask & inside
        if self.sinks is not None:
            q, k, v, mask = self._with_sinks(q, k, v, mask)
        mixed = F.scaled_dot_product_attention(      # a single query, the newest, attends to all keys
            q, k, v, attn_mask=mask, is_causal=mask is None and S > 1, scale=self.scale,
            enable_gqa=self.num_kv_heads < self.num_heads
        )
        return self.out(mixed.transpose(1, 2).reshape(B, S, -1))

    def _projected(self, x_BSD: Tensor) -> Tensor:
        """Project to queries, keys and values [B, S, (H + 2 K) h]; norm all heads together, and clip."""
        rows = self.qkv(x_BSD)
        if self.qk_norm == "all" and self.q_norm is not None and self.k_norm is not None:
            q_width, k_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
            q, k, v = rows.split([q_width, k_width, k_width], dim=-1)
            rows = torch.cat([self.q_norm(q), self.k_norm(k), v], dim=-1)
        return rows if self.clip is None else rows.clamp(-self.clip, self.clip)

    def _with_sinks(self, q_BHSh: Tensor, k_BHLh: Tensor, v_BHLh: Tensor,
                    mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Add the sink of each head as one more key, and the channel by which queries reach it."""
        assert self.sinks is not None and self.scale is not None
        B, H, S, _ = q_BHSh.shape
        held = (self.sinks / self.scale).to(q_BHSh.dtype)[None, :, None, None].expand(B, H, S, 1)
        zeros = q_BHSh.new_zeros(1, 1, 1, _ALIGNED - 1)          # kernels take widths of whole vectors
        q = torch.cat([q_BHSh, held, zeros.expand(B, H, S, -1)], dim=-1)
        k = F.pad(k_BHLh, (0, _ALIGNED, 0, 1))
        marks = torch.zeros_like(k)
        marks[:, :, -1, self.head_dim] = 1
        if mask is None and S > 1:
            mask = torch.ones(S, S, dtype=torch.bool, device=q.device).tril()
        return (q, k + marks, F.pad(v_BHLh, (0, 0, 0, 1)),
                None if mask is None else F.pad(mask, (0, 1), value=True))


def window_mask(positions: int, window: int, device: torch.device) -> Tensor:
    """Build the causal mask of a sliding window, bool [S, S]: a query attends to itself and those before.

    Args:
        positions: S.
        window: keys that a query attends to at most.
        device: of the mask.
    """
    every = torch.ones(positions, positions, dtype=torch.bool, device=device)
    return every.tril() & every.triu(1 - window)


def document_mask(documents_BS: Tensor) -> Tensor:
    """Build the causal attention mask inside documents.

    Args:
        documents_BS: int64 [B, S], document of each position.

    Returns:
        bool [B, 1, S, S], True for a key at the same or an earlier position of the query's document.
    """
    same = documents_BS[:, None, :, None] == documents_BS[:, None, None, :]
    return same & torch.ones_like(same[0, 0]).tril()
