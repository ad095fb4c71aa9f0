"""The decoder-only transformer: embedding, blocks of attention and (sparse or dense) feed-forward, head.

It is built of parts (model/build.py) and knows no config and no parallelism. Parameters are float32 (float64 in
float64 runs) and cast where they are used; `dtype` is the dtype of the activations.

Shapes: B sequences, S positions, T = B*S tokens, D model width, V vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from moetrain.model.attention import Attention, Cache, Earlier, RMSNorm, document_mask, rotary_table
from moetrain.moe.experts import FeedForward
from moetrain.moe.layer import MoELayer
from moetrain.routers.base import RouterContext, RoutingStats


class ModelOutput(NamedTuple):
    logits_BSV: Tensor | None                # None after a pass that only routes, and where something else is made of them
    stats: dict[str, RoutingStats]           # by router name, in layer order
    score: Tensor | None = None              # what was made instead of logits


class BlockOutput(NamedTuple):
    x_BSD: Tensor
    stats: RoutingStats | None
    carry: Tensor | None


class Block(nn.Module):
    """x += attention(norm(x)); x += feed_forward(norm(x)). Holds either `moe` or `ffn`.

    recompute: how to run when gradients are wanted (model/activation_checkpointing.py); None keeps everything for backward.
    """

    def __init__(self, *, attention: Attention, feed_forward: MoELayer | FeedForward, dim: int, eps: float,
                 recompute: Callable[..., BlockOutput] | None = None) -> None:
        super().__init__()
        self.recompute = recompute
        self.attention_norm = RMSNorm(dim=dim, eps=eps)
        self.attention = attention
        self.ffn_norm = RMSNorm(dim=dim, eps=eps)
        sparse = isinstance(feed_forward, MoELayer)
        self.moe = feed_forward if sparse else None
        self.ffn = None if sparse else feed_forward

    def forward(self, x_BSD: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None,
                context: RouterContext, route_only: bool = False, earlier: Earlier | None = None) -> BlockOutput:
        """route_only: stop when the router has decided; x is then not to be used. earlier: for attention."""
        if self.recompute is None or earlier is not None or not torch.is_grad_enabled():
            return self.run(x_BSD, rotary, mask, context, route_only, earlier)
        return self.recompute(self.run, x_BSD, rotary, mask, context, route_only)

    def run(self, x_BSD: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, context: RouterContext,
            route_only: bool = False, earlier: Earlier | None = None) -> BlockOutput:
        if self.moe is not None:
            self.moe.prefetch()
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), rotary, mask, earlier)
        normed = self.ffn_norm(x_BSD)
        if self.moe is None:
            return BlockOutput(x_BSD + self.ffn(normed), None, context.carry)
        sparse = self.moe(normed.flatten(0, 1), context, route_only)
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
    def moe_layers(self) -> dict[str, MoELayer]:
        """MoE layers by the name of their router, in layer order."""
        return {block.moe.name: block.moe for block in self.layers if block.moe is not None}

    @property
    def routers(self) -> dict[str, int]:
        """Number of experts by router name, in layer order."""
        return {name: moe.router.num_experts for name, moe in self.moe_layers.items()}

    @property
    def routers_needing_load_error(self) -> list[str]:
        """Names of the routers whose controllers take the sign of the load error of each micro-batch (routers/base.py)."""
        return [name for name, moe in self.moe_layers.items() if moe.router.needs_load_error]

    def end_of_step(self, counts: Mapping[str, Tensor], load_error_signs: Mapping[str, Tensor]) -> None:
        """Hand every router the counts of its experts, pooled over the optimizer step: selection biases move."""
        for name, moe in self.moe_layers.items():
            moe.router.end_of_step(counts[name], load_error_signs.get(name))

    def forward(self, tokens_BS: Tensor, context: RouterContext, documents_BS: Tensor | None = None,
                route_only: bool = False, cache: Cache | None = None,
                routed: Callable[[Tensor, dict[str, RoutingStats]], Tensor] | None = None,
                score: Callable[[Tensor, Tensor], Tensor] | None = None) -> ModelOutput:
        """route_only: the statistics alone, without what comes after the last router's decision (no logits).

        routed: called with what goes into the head and the statistics of all routers, before the head runs; what it gives goes
        into the head.
        score: called with what would be multiplied, the normed states [B, S, D] and the head [V, D], instead of making logits.
        cache: tokens of the same document before these. They do not run again, and these are added to them.
        """
        x_BSD = F.embedding(tokens_BS, self.embed).to(self.dtype)
        rotary = rotary_table(tokens_BS.shape[1], self.head_dim, self.rope_theta, dtype=self.dtype, device=x_BSD.device,
                              first=0 if cache is None else cache.length)
        mask = None if documents_BS is None else document_mask(documents_BS)
        stats = {}
        last = self.layers[-1]
        for index, block in enumerate(self.layers):
            earlier = None if cache is None else cache.layers[index]
            x_BSD, block_stats, carry = block(x_BSD, rotary, mask, context, route_only and block is last, earlier)
            context = context._replace(carry=carry)
            if block_stats is not None:
                stats[block.moe.name] = block_stats
        if routed is not None:
            x_BSD = routed(x_BSD, stats)
        if route_only:
            return ModelOutput(None, stats)
        head = self.embed if self.head is None else self.head
        with record_function("head"):
            if score is not None:
                return ModelOutput(None, stats, score(self.norm(x_BSD), head))
            return ModelOutput(F.linear(self.norm(x_BSD), head.to(self.dtype)), stats)
