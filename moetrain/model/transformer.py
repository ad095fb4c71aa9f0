"""Decoder-only transformer: embedding, blocks of attention and feed-forward (MoE or dense), head.

It is assembled from parts (model/build.py), and knows neither config nor parallelism. Parameters are float32
(float64 in float64 runs) and cast where they are used; `dtype` is the dtype of the activations.

Shapes: B sequences, S positions, T = B*S tokens, D model width, V vocabulary, E experts, h head width.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from moetrain.model.attention import Attention, Cache, Earlier, document_mask
from moetrain.model.feed_forward import FeedForward
from moetrain.model.latent_attention import LatentAttention
from moetrain.model.norms import LayerNorm, RMSNorm
from moetrain.model.rotary import Rotary, RotaryEmbedding
from moetrain.moe.experts import RoutedExperts
from moetrain.moe.layer import SparseLayer
from moetrain.ops.start import Start, constant, normal
from moetrain.routers.base import Router, RouterContext, RoutingStats
from moetrain.routers.shared import TiedModules, one_of_each

# A function of the head's input [B, S, D], the head [V, D] and its bias [V] or None (`head_inputs`).
Score = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class ModelOutput(NamedTuple):
    """Output of the model: logits or a score, and the statistics of every router."""

    logits_BSV: Tensor | None                # None with `route_only`, and with `score`
    stats: dict[str, RoutingStats]           # by router name, in run order
    score: Tensor | None = None              # result of the function `score`, if one was given
    ahead: Tensor | None = None              # the same, summed over the modules of `ahead`


class Ahead(NamedTuple):
    """What a multi-token prediction module is given: the micro-batch, shifted by the depth of the module."""

    tokens_BS: Tensor                        # int64; position i has the token of position i + depth
    valid_BS: Tensor                         # bool: there is such a token, and it is routed and balanced
    score: Score | None = None               # as that of `Transformer.forward`; not with `route_only`


class BlockOutput(NamedTuple):
    """Output of a block, the statistics of its routers, and what they hand to the next layer's."""

    x_BSD: Tensor
    stats: dict[str, RoutingStats]           # by router name, in run order; empty for a dense block
    carry: Tensor | None


class Block(nn.Module):
    """Pre-norm block: x += attention(norm(x)); x += feed_forward(norm(x)).

    One of `moe` and `ffn` is the feed-forward part, the other is None. A sparse layer that `takes_stream`
    maps x itself, and applies the second norm where it needs it. The attention may be a sparse layer, too
    (moe/layer.py).

    Args:
        attention: self-attention.
        feed_forward: a sparse layer, such as an MoE layer, or a dense network.
        dim: D.
        eps: of the norms.
        norm: class of the norms.
        residual_multiplier: factor of what both parts add to the residual stream (Granite).
        recompute: runs the block with activation checkpointing (model/activation_checkpointing.py); None
            keeps everything for backward.
    """

    def __init__(self, *, attention: Attention | LatentAttention | SparseLayer,
                 feed_forward: SparseLayer | FeedForward, dim: int, eps: float,
                 norm: type[RMSNorm] | type[LayerNorm] = RMSNorm,
                 residual_multiplier: float = 1.0,
                 recompute: Callable[..., BlockOutput] | None = None) -> None:
        super().__init__()
        self.recompute, self.residual_multiplier = recompute, residual_multiplier
        self.attention_norm = norm(dim=dim, eps=eps)
        self.attention = attention
        self.ffn_norm = norm(dim=dim, eps=eps)
        sparse = isinstance(feed_forward, SparseLayer)
        self.moe = feed_forward if sparse else None
        self.ffn = None if sparse else feed_forward

    @property
    def sparse_layers(self) -> list[SparseLayer]:
        """The parts of the block that route, in run order."""
        return [part for part in (self.attention, self.moe) if isinstance(part, SparseLayer)]

    def forward(self, x_BSD: Tensor, rotary: Rotary, mask: Tensor | None,
                context: RouterContext, route_only: bool = False,
                earlier: Earlier | None = None) -> BlockOutput:
        """Run the block, with activation checkpointing if gradients are enabled.

        Args:
            x_BSD: [B, S, D], residual stream.
            rotary: cos and sin of the positions.
            mask: bool [B, 1, S, S], True where a query attends to a key; None is causal.
            context: what routers may know of the micro-batch.
            route_only: stop once the router has decided; x of the output is then meaningless.
            earlier: the key-value cache of the block's attention; disables checkpointing.

        Returns:
            The residual stream, and what the router returned.
        """
        if self.recompute is None or earlier is not None or not torch.is_grad_enabled():
            return self.run(x_BSD, rotary, mask, context, route_only, earlier)
        return self.recompute(self.run, x_BSD, rotary, mask, context, route_only)

    def run(self, x_BSD: Tensor, rotary: Rotary, mask: Tensor | None, context: RouterContext,
            route_only: bool = False, earlier: Earlier | None = None) -> BlockOutput:
        """Run the block without activation checkpointing. Arguments as in `forward`."""
        for layer in self.sparse_layers:
            layer.prefetch()
        stats: dict[str, RoutingStats] = {}
        normed = self.attention_norm(x_BSD)
        if isinstance(self.attention, SparseLayer):
            attended = self.attention(normed, context, route_only and self.moe is None, rotary=rotary,
                                      mask=mask, earlier=earlier)
            x_BSD, context = self._add(x_BSD, attended.out_TD), context._replace(carry=attended.carry)
            stats.update(attended.stats)
        else:
            x_BSD = self._add(x_BSD, self.attention(normed, rotary, mask, earlier))
        if self.moe is not None and self.moe.takes_stream:
            sparse = self.moe(x_BSD, context, route_only, norm=self.ffn_norm)
            return BlockOutput(sparse.out_TD, {**stats, **sparse.stats}, sparse.carry)
        normed = self.ffn_norm(x_BSD)
        if self.moe is None:
            assert self.ffn is not None
            return BlockOutput(self._add(x_BSD, self.ffn(normed)), stats, context.carry)
        sparse = self.moe(normed.flatten(0, 1), context, route_only)
        return BlockOutput(self._add(x_BSD, sparse.out_TD.view_as(x_BSD)), {**stats, **sparse.stats},
                           sparse.carry)

    def _add(self, x_BSD: Tensor, out_BSD: Tensor) -> Tensor:
        """Add the output of a part to the residual stream."""
        scaled = out_BSD if self.residual_multiplier == 1 else out_BSD * self.residual_multiplier
        return x_BSD + scaled


class Transformer(nn.Module):
    """The language model; `forward` returns logits and the statistics of every router.

    Attributes:
        tied: modules that routers of several layers use (`Router.shared_modules`).

    Args:
        vocab_size: V.
        dim: D.
        layers: the blocks, in order.
        mtp: modules of multi-token prediction (model/multi_token_prediction.py), by depth. They share
            embedding and head, which belong to the model: FSDP2 gathers these for all of `forward`.
        rotary: angles of the rotary embedding.
        eps: of the last norm.
        norm: class of the last norm.
        tie_embeddings: use the embedding as the head.
        head_bias: add a bias to the logits.
        embedding_multiplier: factor of the embedding (Granite).
        logits_scaling: divides the logits (Granite).
        dtype: dtype of the activations.
    """

    def __init__(self, *, vocab_size: int, dim: int, layers: list[Block], mtp: Sequence[Block] = (),
                 rotary: RotaryEmbedding, eps: float, norm: type[RMSNorm] | type[LayerNorm] = RMSNorm,
                 tie_embeddings: bool = False, head_bias: bool = False, embedding_multiplier: float = 1.0,
                 logits_scaling: float = 1.0, dtype: torch.dtype) -> None:
        super().__init__()
        self.rotary, self.dtype = rotary, dtype
        self.embedding_multiplier, self.logits_scaling = embedding_multiplier, logits_scaling
        self.embed = nn.Parameter(torch.empty(vocab_size, dim))
        self.layers = nn.ModuleList(layers)
        self.mtp = nn.ModuleList(mtp)
        self.norm = norm(dim=dim, eps=eps)
        self.head = None if tie_embeddings else nn.Parameter(torch.empty(vocab_size, dim))
        self.head_bias = nn.Parameter(torch.empty(vocab_size)) if head_bias else None
        self.tied = TiedModules(self.shared_modules())

    def starts(self) -> dict[str, Start]:
        """How embedding and head start."""
        return {"embed": normal()} | ({} if self.head is None else {"head": normal()}) | (
            {} if self.head_bias is None else {"head_bias": constant(0)})

    def shared_modules(self) -> dict[str, nn.Module]:
        """Make one of each module that the routers share."""
        return one_of_each(router.shared_modules() for router in self.routers.values())

    @property
    def blocks(self) -> list[Block]:
        """The blocks in run order, those of multi-token prediction last."""
        return [*self.layers, *self.mtp]

    @property
    def sparse_layers(self) -> list[SparseLayer]:
        """The parts of all blocks that route, in run order."""
        return [layer for block in self.blocks for layer in block.sparse_layers]

    @property
    def routers(self) -> dict[str, Router]:
        """Routers by name, in run order. A router that decides in several passes has a name for each."""
        return _routers_of(self.blocks)

    @property
    def main_routers(self) -> dict[str, Router]:
        """Those of `routers` that run in evaluation and generation, too: not those of `mtp`."""
        return _routers_of(self.layers)

    @property
    def num_choices(self) -> dict[str, int]:
        """Number of choices by router name, in run order: the widths of statistics and loads."""
        return {name: router.num_choices for name, router in self.routers.items()}

    @property
    def num_experts(self) -> dict[str, int]:
        """Number of experts by router name, in run order: the first of its choices."""
        return {name: router.num_experts for name, router in self.routers.items()}

    @property
    def banks(self) -> dict[str, RoutedExperts]:
        """Banks of experts by name, in run order. Several layers may share one."""
        return {name: experts for layer in self.sparse_layers for name, experts in layer.banks.items()}

    @property
    def feeds(self) -> dict[str, tuple[str, ...]]:
        """Names of the routers that choose from a bank, by its name."""
        layers = self.sparse_layers
        return {bank: tuple(router for layer in layers for router in layer.feeds.get(bank, ()))
                for bank in self.banks}

    @property
    def passes(self) -> dict[str, int]:
        """How often a forward pass of the model passes over a bank, by its name."""
        layers = self.sparse_layers
        return {bank: sum(layer.passes.get(bank, 0) for layer in layers) for bank in self.banks}

    @property
    def routers_needing_load_error(self) -> list[str]:
        """Names of the routers that need the load-error signs of each micro-batch (routers/base.py)."""
        return [name for name, router in self.routers.items() if router.needs_load_error]

    def end_of_step(self, counts: Mapping[str, Tensor], tokens: int,
                    load_error_signs: Mapping[str, Tensor],
                    quantiles: Mapping[Router, Tensor] = {}) -> None:
        """Update every router's controller, such as selection biases, after an optimizer step.

        A router that decides in several passes is updated once, by the sum of its counts and the mean of its
        signs.

        Args:
            counts: int64 [C] by router name, pooled over ranks and micro-batches.
            tokens: valid tokens of the step.
            load_error_signs: float64 [C], mean over micro-batches, for `routers_needing_load_error`.
            quantiles: float32 [C], quantiles of the margins, of the routers with `margin_quantile`.
        """
        routers, names = self.routers, dict[Router, list[str]]()
        for name, router in routers.items():
            names.setdefault(router, []).append(name)
        for router, margins_C in quantiles.items():
            router.take_quantiles(margins_C)
        for router, passes in names.items():
            signs = [load_error_signs[name] for name in passes if name in load_error_signs]
            router.end_of_step(reduce(torch.add, [counts[name] for name in passes]), tokens * len(passes),
                               reduce(torch.add, signs) / len(signs) if signs else None)
        of_class: dict[type[Router], dict[str, Router]] = {}
        for name, router in routers.items():
            of_class.setdefault(type(router), {})[name] = router
        for cls, alike in of_class.items():
            cls.end_of_step_together(list(alike.values()), [counts[name] for name in alike], tokens)

    def forward(self, tokens_BS: Tensor, context: RouterContext, documents_BS: Tensor | None = None,
                route_only: bool = False, cache: Cache | None = None,
                routed: Callable[[Tensor, dict[str, RoutingStats]], Tensor] | None = None,
                score: Score | None = None, ahead: Sequence[Ahead] = ()) -> ModelOutput:
        """Run the model over a micro-batch.

        Args:
            tokens_BS: int64 [B, S].
            context: what routers may know of the micro-batch.
            documents_BS: int64 [B, S], document of each position, which attention does not leave; None is
                plain causal attention.
            route_only: stop once the last router has decided, and return only the statistics.
            cache: keys and values of earlier tokens of the same document, which do not run again; those of
                `tokens_BS` are appended.
            routed: called with the output [B, S, D] of the last block, behind which no router runs, and the
                statistics of all routers; its result takes the output's place.
            score: called with what `head_inputs` returns, in place of their product, the logits.
            ahead: what each module of `mtp` is given; empty where none of them runs.

        Returns:
            Logits [B, S, V] or the score, the statistics, and the sum of the scores further ahead.
        """
        x_BSD = self.embedded(tokens_BS)
        rotary = self.rotary.table(tokens_BS.shape[1], dtype=self.dtype, device=x_BSD.device,
                                   first=0 if cache is None else cache.length)
        mask = None if documents_BS is None else document_mask(documents_BS)
        stats: dict[str, RoutingStats] = {}
        context = context._replace(tied=self.tied)
        assert len(ahead) in (0, len(self.mtp)), (len(ahead), len(self.mtp))
        last = (self.mtp if ahead else self.layers)[-1]
        for index, block in enumerate(self.layers):
            earlier = None if cache is None else cache.layers[index]
            x_BSD, block_stats, carry = block(x_BSD, rotary, mask, context, route_only and block is last,
                                              earlier)
            context = context._replace(carry=carry)
            stats.update(block_stats)
        before: list[Tensor] = []                # normalized inputs of the head, but for the last one
        for module, given in zip(self.mtp, ahead):
            before.append(x_BSD if before else self.norm(x_BSD))
            context = context._replace(token_ids_T=given.tokens_BS.flatten(),
                                       valid_T=given.valid_BS.flatten())
            x_BSD, block_stats, carry = module(before[-1], self.embedded(given.tokens_BS), rotary, mask,
                                               context, route_only and module is last)
            context = context._replace(carry=carry)
            stats.update(block_stats)
        ran = self.routers if ahead else self.main_routers
        assert list(stats) == list(ran), (list(stats), list(ran))
        if routed is not None:
            x_BSD = routed(x_BSD, stats)
        if route_only:
            return ModelOutput(None, stats)
        with record_function("head"):
            main_BSD, *further = [*before, x_BSD] if before else [self.norm(x_BSD)]
            states_BSD, head_VD, bias_V = self.head_inputs(main_BSD)
            if score is not None:
                total = score(states_BSD, head_VD, bias_V)
                scores = [given.score(*self.head_inputs(each_BSD)) for given, each_BSD in zip(ahead, further)
                          if given.score is not None]
                return ModelOutput(None, stats, total, reduce(torch.add, scores) if scores else None)
            bias_V = None if bias_V is None else bias_V.to(self.dtype)
            return ModelOutput(F.linear(states_BSD, head_VD.to(self.dtype), bias_V), stats)

    def embedded(self, tokens_BS: Tensor) -> Tensor:
        """Embed tokens as the first block is given them, [B, S, D]."""
        x_BSD = F.embedding(tokens_BS, self.embed).to(self.dtype)
        return x_BSD if self.embedding_multiplier == 1 else x_BSD * self.embedding_multiplier

    def head_inputs(self, states_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Prepare what logits are made of, which are states head^T + bias.

        Dividing states and bias by `logits_scaling` divides the logits, whoever multiplies them and in
        whatever chunks.

        Args:
            states_BSD: [B, S, D], normalized.

        Returns:
            The states [B, S, D], the head [V, D] and the bias [V] or None.
        """
        bias_V = self.head_bias
        if self.logits_scaling != 1:
            states_BSD = states_BSD / self.logits_scaling
            bias_V = None if bias_V is None else bias_V / self.logits_scaling
        return states_BSD, self.embed if self.head is None else self.head, bias_V


def _routers_of(blocks: Iterable[Block]) -> dict[str, Router]:
    """Routers of blocks by name, in run order."""
    return {name: router for block in blocks for layer in block.sparse_layers
            for name, router in layer.routers.items()}
