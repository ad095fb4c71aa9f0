"""The decoder-only transformer: embedding, blocks of attention and (sparse or dense) feed-forward, head.

It is built of parts (model/build.py) and knows no config and no parallelism. Parameters are float32 (float64 in
float64 runs) and cast where they are used; `dtype` is the dtype of the activations.

Shapes: B sequences, S positions, T = B*S tokens, D model width, V vocabulary.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.model.attention import Attention, RMSNorm, document_mask, rotary_table
from moetrain.moe.experts import FeedForward
from moetrain.moe.layer import MoELayer
from moetrain.routers.base import RouterContext, RoutingStats


class ModelOutput(NamedTuple):
    logits_BSV: Tensor
    stats: dict[str, RoutingStats]           # by router name, in layer order


class BlockOutput(NamedTuple):
    x_BSD: Tensor
    stats: RoutingStats | None
    carry: Tensor | None


class Block(nn.Module):
    """x += attention(norm(x)); x += feed_forward(norm(x)). Holds either `moe` or `ffn`."""

    def __init__(self, *, attention: Attention, feed_forward: MoELayer | FeedForward, dim: int, eps: float) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(dim=dim, eps=eps)
        self.attention = attention
        self.ffn_norm = RMSNorm(dim=dim, eps=eps)
        sparse = isinstance(feed_forward, MoELayer)
        self.moe = feed_forward if sparse else None
        self.ffn = None if sparse else feed_forward

    def forward(self, x_BSD: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None,
                context: RouterContext) -> BlockOutput:
        if self.moe is not None:
            self.moe.post()
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), rotary, mask)
        normed = self.ffn_norm(x_BSD)
        if self.moe is None:
            return BlockOutput(x_BSD + self.ffn(normed), None, context.carry)
        sparse = self.moe(normed.flatten(0, 1), context)
        return BlockOutput(x_BSD + sparse.out_TD.view_as(x_BSD), sparse.stats, sparse.carry)


class Transformer(nn.Module):
    """The model; `forward` gives logits and the statistics of every router."""

    def __init__(self, *, vocab_size: int, dim: int, layers: list[Block], head_dim: int, rope_theta: float,
                 eps: float, tie_embeddings: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.head_dim, self.rope_theta, self.dtype = head_dim, rope_theta, dtype
        self.embed = nn.Parameter(torch.empty(vocab_size, dim))
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(dim=dim, eps=eps)
        self.head = None if tie_embeddings else nn.Parameter(torch.empty(vocab_size, dim))

    @property
    def routers(self) -> dict[str, int]:
        """Number of experts by router name, in layer order."""
        return {block.moe.name: block.moe.router.num_experts for block in self.layers if block.moe is not None}

    def forward(self, tokens_BS: Tensor, context: RouterContext, documents_BS: Tensor | None = None) -> ModelOutput:
        x_BSD = F.embedding(tokens_BS, self.embed).to(self.dtype)
        rotary = rotary_table(tokens_BS.shape[1], self.head_dim, self.rope_theta, dtype=self.dtype, device=x_BSD.device)
        mask = None if documents_BS is None else document_mask(documents_BS)
        stats = {}
        for block in self.layers:
            x_BSD, block_stats, carry = block(x_BSD, rotary, mask, context)
            context = context._replace(carry=carry)
            if block_stats is not None:
                stats[block.moe.name] = block_stats
        head = self.embed if self.head is None else self.head
        return ModelOutput(F.linear(self.norm(x_BSD), head.to(self.dtype)), stats)
