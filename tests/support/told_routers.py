"""Routers that exist in tests only: each needs something that a router is told beside x.

    convert_model=noisy        keyed noise on the logits and random weights
    convert_model=told         choices by token id, position and keyed integers alone, never by x
    convert_model=scheduled    a number of experts that grows with the step

They stand in place of the routers that the config chose, with the same parameters.

Shapes: T tokens, D model width, E experts, K slots.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moetrain.config.schema import Config
from moetrain.model.transformer import Transformer
from moetrain.ops.gating import decide, gather_weights, top_k
from moetrain.ops.keyed_random import gumbel, integers, uniform
from moetrain.routers.base import RouterContext, Routing, drop_padding
from moetrain.routers.topk import TopKRouter


class Told(NamedTuple):
    """What a router was told, and what it chose."""

    context: RouterContext
    ids_TK: Tensor


TOLD: list[Told] = []                        # by every ToldRouter of this process, in order


class _ByIds(TopKRouter):
    """Base class of routers that choose in `chosen` and weigh by the softmax."""

    def route(self, x_TD: Tensor, context: RouterContext) -> Routing:
        logits_TE = self.logits(x_TD)
        ids_TK = decide(drop_padding(self.chosen(logits_TE, context), context))
        probs_TE = logits_TE.softmax(-1)
        weights_TK = gather_weights(probs_TE, ids_TK)
        return self.routing(ids_TK, self.weighed(weights_TK, context), probs_TE, logits_TE, context)

    def chosen(self, logits_TE: Tensor, context: RouterContext) -> Tensor:
        raise NotImplementedError

    def weighed(self, weights_TK: Tensor, context: RouterContext) -> Tensor:
        return weights_TK


class NoisyRouter(_ByIds):
    """Draws experts from the softmax (Gumbel noise), and scales their weights by a random factor."""

    depends_on = frozenset({"sample_ids_T", "positions_T"})

    def chosen(self, logits_TE: Tensor, context: RouterContext) -> Tensor:
        noise_TE = gumbel(context, self.num_experts, use="choice", dtype=logits_TE.dtype)
        return top_k(logits_TE + noise_TE, self.top_k)[1]

    def weighed(self, weights_TK: Tensor, context: RouterContext) -> Tensor:
        return weights_TK * (0.5 + uniform(context, self.top_k, use="weight", dtype=weights_TK.dtype))


class ToldRouter(_ByIds):
    """Records what it is told, and chooses by token id, position and a keyed integer."""

    depends_on = frozenset({"token_ids_T", "positions_T", "sample_ids_T"})

    def chosen(self, logits_TE: Tensor, context: RouterContext) -> Tensor:
        drawn_T = integers(context, 1, self.num_experts)[:, 0]
        return self.told(7 * context.token_ids_T + 3 * context.positions_T + drawn_T + context.step, context)

    def told(self, first_T: Tensor, context: RouterContext) -> Tensor:
        """Choose the experts from `first_T` on, and record it."""
        ids_TK = (first_T[:, None] + torch.arange(self.top_k, device=first_T.device)) % self.num_experts
        TOLD.append(Told(context, ids_TK))
        return ids_TK


class DomainRouter(ToldRouter):
    """Sends each domain to experts of its own."""

    depends_on = frozenset({"domains_T"})

    def chosen(self, logits_TE: Tensor, context: RouterContext) -> Tensor:
        return self.told(context.domains_T, context)


class LookingAheadRouter(_ByIds):
    """Chooses by the mean of all tokens of the micro-batch."""

    causal = False

    def chosen(self, logits_TE: Tensor, context: RouterContext) -> Tensor:
        return top_k(logits_TE + logits_TE.mean(0), self.top_k)[1]


class ScheduledRouter(_ByIds):
    """One expert in steps 1 and 2, two in 3 and 4, and so on up to K."""

    def chosen(self, logits_TE: Tensor, context: RouterContext) -> Tensor:
        used = min(self.top_k, (context.step + 1) // 2)
        return top_k(logits_TE, self.top_k)[1].index_fill(1, torch.arange(used, self.top_k), -1)


def _replaced(model: Transformer, kind: type[TopKRouter]) -> None:
    for block in model.layers:
        if block.moe is not None:
            own = block.moe.router
            block.moe.router = kind(dim=own.weight.shape[1], num_experts=own.num_experts, top_k=own.top_k)


def noisy(model: Transformer, config: Config) -> None:
    _replaced(model, NoisyRouter)


def told(model: Transformer, config: Config) -> None:
    _replaced(model, ToldRouter)


def by_domain(model: Transformer, config: Config) -> None:
    _replaced(model, DomainRouter)


def looking_ahead(model: Transformer, config: Config) -> None:
    _replaced(model, LookingAheadRouter)


def scheduled(model: Transformer, config: Config) -> None:
    _replaced(model, ScheduledRouter)
