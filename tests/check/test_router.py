"""A router that breaks a promise is found out, and by the check that is about it."""

import pytest
import torch
from torch import Tensor

from moetrain.check.findings import findings
from moetrain.check.router import router_checks
from moetrain.ops import keyed_random
from moetrain.routers.base import RouterContext, Routing, Scores
from moetrain.routers.topk import TopKRouter

D = 6


class GlobalNoise(TopKRouter):
    def logits(self, x_TD: Tensor) -> Tensor:
        logits = super().logits(x_TD)
        return logits + torch.randn_like(logits)


class KeyedNoise(TopKRouter):
    depends_on = frozenset({"sample_ids_T", "positions_T"})

    def scores(self, x_TD: Tensor, context: RouterContext) -> Scores:
        scores = super().scores(x_TD, context)
        noise = keyed_random.gumbel(context, self.num_experts, dtype=torch.float64)
        return scores._replace(order_TC=scores.order_TC.log() + noise)


class UndeclaredNoise(KeyedNoise):
    depends_on = frozenset({"sample_ids_T"})


class SeesTheBatch(TopKRouter):
    def logits(self, x_TD: Tensor) -> Tensor:
        return super().logits(x_TD - x_TD.mean(0, keepdim=True) if len(x_TD) else x_TD)


class SeesTheBatchAndSaysSo(TopKRouter):
    causal = False

    def scores(self, x_TD: Tensor, context: RouterContext) -> Scores:
        valid_T1 = context.valid_T[:, None]
        mean_1D = x_TD.where(valid_T1, 0).sum(0, keepdim=True) / valid_T1.sum().clamp(min=1)
        return super().scores(x_TD - mean_1D, context)


class RoutesPadding(TopKRouter):
    def route(self, x_TD: Tensor, context: RouterContext) -> Routing:
        return super().route(x_TD, context._replace(valid_T=None))


class Remembers(TopKRouter):
    calls = 0

    def logits(self, x_TD: Tensor) -> Tensor:
        self.calls += 1
        return super().logits(x_TD) * self.calls


class TakesOneTwice(TopKRouter):
    def choose(self, order_TC: Tensor | None, context: RouterContext) -> Tensor:
        best_T1 = super().choose(order_TC, context)[:, :1]
        return torch.cat([best_T1, best_T1], dim=1)


class WrongGradient(TopKRouter):
    def weigh(self, scores: Scores, ids_TK: Tensor, context: RouterContext) -> Tensor:
        weights_TK = super().weigh(scores, ids_TK, context)
        return weights_TK.detach() + 0.5 * (weights_TK - weights_TK.detach())


class OfItsOwnRank(TopKRouter):
    ranks = 0

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.register_buffer("bias", torch.zeros(1))
        self.rank = OfItsOwnRank.ranks = OfItsOwnRank.ranks + 1

    def end_of_step(self, counts_E: Tensor, tokens: int, signs_E: Tensor | None = None) -> None:
        self.bias += self.rank


class ForgetsOnSave(TopKRouter):
    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.register_buffer("threshold", torch.zeros(1), persistent=False)

    def end_of_step(self, counts_E: Tensor, tokens: int, signs_E: Tensor | None = None) -> None:
        self.threshold += counts_E.sum() / tokens


@pytest.mark.parametrize("cls, promise", [
    (TopKRouter, None), (KeyedNoise, None), (SeesTheBatchAndSaysSo, None),
    (GlobalNoise, "the same tokens decide the same again"),
    (Remembers, "the same tokens decide the same again"),
    (SeesTheBatch, "a token does not see later tokens"),
    (SeesTheBatch, "a token decides alike alone and in any batch, and statistics are sums over tokens"),
    (RoutesPadding, "padding of any content leaves no trace"),
    (UndeclaredNoise, "it reads no more of the context than depends_on says"),
    (TakesOneTwice, "a decision is well formed"),
    (WrongGradient, "gradients are those of finite differences"),
    (OfItsOwnRank, "end_of_step is the same on every rank"),
    (ForgetsOnSave, "end_of_step is the same on every rank"),
])
def test_what_is_broken_is_found(cls: type[TopKRouter], promise: str | None) -> None:
    def make() -> TopKRouter:
        router = cls(dim=D, num_experts=8, top_k=2).double()
        with torch.no_grad():
            router.weight.copy_(torch.randn(8, D, generator=torch.Generator().manual_seed(7)))
        return router

    found = list(findings(router_checks(make, D)))
    broken = {finding.name: finding.problem for finding in found if finding.problem}
    assert promise in broken if promise else broken == {}
    # What does not apply is said not to have been tried, instead of that it holds.
    assert len([finding for finding in found if finding.not_tried]) == (0 if cls.causal else 2)
