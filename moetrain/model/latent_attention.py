"""Multi-head latent attention: keys and values of all heads are made of one short vector of a token.

    q           = W_q x,  or  W_qb norm(W_qa x)            a query of each head: n channels, and r that turn
    c, k_r      = norm(first c rows of W_kva x), the rest  one latent, and r channels that turn, for all heads
    k_n, v      = W_kvb c                                  keys and values of each head
    a_h         = softmax(s (q_n,h k_n,h + rot(q_r,h) rot(k_r)))
    y           = W_o [a_1 v_1; ...]

s: 1 / sqrt(n + r), times the square of YaRN's scale (config/rope_scaling.py). DeepSeek-AI 2024,
"DeepSeek-V2" (arXiv 2405.04434), section 2.1 and equations 37 to 47, and its released code.

A cache keeps latent and k_r of earlier tokens, c + r numbers each, whatever the heads. A token that comes
alone does not expand them: its queries are mapped into the space of the latents, and what the heads have read
there is mapped out (section 2.1.2),

    q_n,h . k_n,h = (K_h^T q_n,h) . c,      a_h v_h = V_h (a_h c),      K_h, V_h: rows of head h in W_kvb

Shapes: B sequences, S positions, L keys, D model width, H heads, n and r channels of a key, v of a value, c
of the latent.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.model.attention import Earlier
from moetrain.model.norms import RMSNorm
from moetrain.model.projection import Projection
from moetrain.model.rotary import Rotary, rotate
from moetrain.ops.start import Start, residual_normal


class LatentAttention(nn.Module):
    """Self-attention of one block over compressed keys and values.

    Args:
        dim: D.
        num_heads: H.
        q_rank: width of the latent that queries are made of; None makes them of x.
        kv_rank: c.
        nope_dim: n, channels of queries and keys that do not turn.
        rope_dim: r, channels that turn.
        value_dim: v.
        eps: of the norms of the latents.
        scale: s; None: 1 / sqrt(n + r).
        bias: which projections have a bias: none, qkv (to both latents), or all, the last one, too.
    """

    def __init__(self, *, dim: int, num_heads: int, q_rank: int | None, kv_rank: int, nope_dim: int,
                 rope_dim: int, value_dim: int, eps: float, scale: float | None = None,
                 bias: Literal["none", "qkv", "all"] = "none") -> None:
        super().__init__()
        self.num_heads, self.kv_rank = num_heads, kv_rank
        self.nope_dim, self.rope_dim, self.value_dim = nope_dim, rope_dim, value_dim
        self.scale = (nope_dim + rope_dim) ** -0.5 if scale is None else scale
        queries, biased = num_heads * (nope_dim + rope_dim), bias != "none"
        self.q = self.q_a = self.q_a_norm = self.q_b = None
        if q_rank is None:
            self.q = Projection(in_dim=dim, out_dim=queries)
        else:
            self.q_a = Projection(in_dim=dim, out_dim=q_rank, bias=biased)
            self.q_a_norm = RMSNorm(dim=q_rank, eps=eps)
            self.q_b = Projection(in_dim=q_rank, out_dim=queries)
        self.kv_a = Projection(in_dim=dim, out_dim=kv_rank + rope_dim, bias=biased)
        self.kv_a_norm = RMSNorm(dim=kv_rank, eps=eps)
        self.kv_b = Projection(in_dim=kv_rank, out_dim=num_heads * (nope_dim + value_dim))
        self.out = Projection(in_dim=num_heads * value_dim, out_dim=dim, bias=bias == "all")

    def starts(self) -> dict[str, Start]:
        """How the matrix that writes to the residual stream starts."""
        return {"out.weight": residual_normal(drawn_as="out")}

    @property
    def cached(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Heads and width of what a cache keeps of a token: the latent, and the channels that have turned."""
        return (1, self.kv_rank), (1, self.rope_dim)

    def forward(self, x_BSD: Tensor, rotary: Rotary, mask: Tensor | None,
                earlier: Earlier | None = None) -> Tensor:
        """Attend to earlier positions of the same sequence, or document. Arguments as of `Attention`."""
        B, S, _ = x_BSD.shape
        q_BHSq = self._queries(x_BSD).view(B, S, self.num_heads, -1).transpose(1, 2)
        q_n, q_r = q_BHSq.split([self.nope_dim, self.rope_dim], dim=-1)
        c_BSc, k_r = self.kv_a(x_BSD).split([self.kv_rank, self.rope_dim], dim=-1)
        q_r, k_r = rotate(q_r, rotary), rotate(k_r[:, None], rotary)
        c = self.kv_a_norm(c_BSc)[:, None]
        if earlier is not None:
            c, k_r = earlier.extend(c, k_r)
            assert S == 1 or c.shape[2] == S, f"{S} positions at once after {c.shape[2] - S} earlier ones"
        if S == 1 and c.shape[2] > 1 and self._is_one_matrix():
            return self.out(self._of_latents(q_n, q_r, c, k_r).flatten(1)[:, None])
        kv = self.kv_b(c[:, 0]).view(B, -1, self.num_heads, self.nope_dim + self.value_dim).transpose(1, 2)
        k_n, v = kv.split([self.nope_dim, self.value_dim], dim=-1)
        k = torch.cat([k_n, k_r.expand(-1, self.num_heads, -1, -1)], dim=-1)
        q = torch.cat([q_n, q_r], dim=-1)
        width = max(q.shape[-1], v.shape[-1])        # one width for all, which every kernel takes
        q, k, v = (t if t.shape[-1] == width else F.pad(t, (0, width - t.shape[-1])) for t in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale,
                                               is_causal=mask is None and S > 1)
        return self.out(mixed[..., :self.value_dim].transpose(1, 2).reshape(B, S, -1))

    def _queries(self, x_BSD: Tensor) -> Tensor:
        """Map x to the queries of all heads, [B, S, H (n + r)]."""
        if self.q is not None:
            return self.q(x_BSD)
        assert self.q_a is not None and self.q_a_norm is not None and self.q_b is not None
        return self.q_b(self.q_a_norm(self.q_a(x_BSD)))

    def _is_one_matrix(self) -> bool:
        """Whether latents are multiplied with one matrix: convert_model may add to it, or replace it."""
        return type(self.kv_b) is Projection and self.kv_b.bias is None and self.kv_b.low_rank is None

    def _of_latents(self, q_n: Tensor, q_r: Tensor, c: Tensor, k_r: Tensor) -> Tensor:
        """Let one query of each head read the latents.

        Args:
            q_n: [B, H, 1, n], channels of the query that do not turn.
            q_r: [B, H, 1, r], those that have turned.
            c: [B, 1, L, c], latents.
            k_r: [B, 1, L, r], channels of the keys that have turned.

        Returns:
            [B, H, v].
        """
        rows = self.kv_b.weight.to(c.dtype).view(self.num_heads, -1, self.kv_rank)
        to_keys_Hnc, to_values_Hvc = rows.split([self.nope_dim, self.value_dim], dim=1)
        q = torch.cat([torch.einsum("bhsn,hnc->bhsc", q_n, to_keys_Hnc), q_r], dim=-1)
        scores = (q @ torch.cat([c, k_r], dim=-1).mT) * self.scale
        wide = scores if scores.dtype == torch.float64 else scores.float()
        read = wide.softmax(-1).to(c.dtype) @ c
        return torch.einsum("bhsc,hvc->bhv", read, to_values_Hvc)
