"""Losses of sums that a loss brings, or that are pooled before backward; in tests only."""

from collections.abc import Mapping

import torch
from torch import Tensor

from moetrain.losses.base import AuxLoss, Pooled, PoolRule
from moetrain.losses.mutual_information import MutualInformationLoss
from moetrain.ops.router_sums import Decided, first_choices, importance
from moetrain.routers.base import RoutingStats
from moetrain.train.state import Run


class FirstChoiceLoss(AuxLoss):
    """GShard's balance: E sum_i (tokens that take i first / N) (sum p_i / N), over the step."""

    weight, reduction, pool, token_sums = 0.3, "mean", None, {"first_E": first_choices}
    pooled_sums = frozenset({"first_E"})

    def __init__(self, pool: PoolRule | None) -> None:
        self.pool = pool

    def value(self, stats: RoutingStats, pooled: Pooled) -> Tensor:
        return (self.slopes(stats, pooled)["prob_sum_E"] * stats.prob_sum_E).sum(-1)

    def slopes(self, stats: RoutingStats, pooled: Pooled) -> dict[str, Tensor]:
        tokens = pooled.tokens.clamp(min=1).to(stats.prob_sum_E.dtype)
        first_RE = pooled.sums["first_E"].to(stats.prob_sum_E.dtype)
        return {"prob_sum_E": first_RE.shape[-1] * first_RE / tokens ** 2}

    def metrics(self, sums: Mapping[str, Mapping[str, Tensor]], tokens: int) -> dict[str, float]:
        largest = [first_E.max().item() for first_E in sums["first_E"].values()]
        return {"moe/first_share": sum(largest) / len(largest) / max(1, tokens)}


class ImportanceLoss(AuxLoss):
    """Squared coefficient of variation of the summed gate weights I: E sum I_i^2 / (sum I)^2 - 1."""

    weight, reduction, pool, token_sums = 0.2, "mean", None, {"importance_E": importance}
    pooled_sums = frozenset({"importance_E", "tokens"})

    def __init__(self, pool: PoolRule | None) -> None:
        self.pool = pool

    def value(self, stats: RoutingStats, pooled: Pooled) -> Tensor:
        """The share of the micro-batch: its tokens of the loss, and what its sums change in it."""
        total_RE = pooled.sums["importance_E"]
        here_RE = stats.extra["importance_E"]
        loss_R = total_RE.shape[-1] * (total_RE ** 2).sum(-1) / total_RE.sum(-1) ** 2 - 1
        linear_R = (self.slopes(stats, pooled)["importance_E"] * here_RE).sum(-1)
        share_R = loss_R * stats.tokens / pooled.sums["tokens"]
        return linear_R + (share_R.to(here_RE.dtype) - linear_R.detach())

    def slopes(self, stats: RoutingStats, pooled: Pooled) -> dict[str, Tensor]:
        total_RE = pooled.sums["importance_E"]
        sum_R1 = total_RE.sum(-1, keepdim=True)
        squares_R1 = (total_RE ** 2).sum(-1, keepdim=True)
        slope_RE = 2 * total_RE.shape[-1] * (total_RE / sum_R1 ** 2 - squares_R1 / sum_R1 ** 3)
        return {"importance_E": slope_RE.to(stats.extra["importance_E"].dtype)}


def peak_sum(decided: Decided) -> Tensor:
    """Sum over tokens of the square of their largest probability, with gradient."""
    return decided.probs_TC.amax(-1).square().sum()


class PeakLoss(AuxLoss):
    """Mean of `local_sum`, a sum that the routers bring."""

    weight, reduction, pool = 0.4, "sum", None

    def value(self, stats: RoutingStats, pooled: Pooled) -> Tensor:
        return self.slopes(stats, pooled)["local_sum"] * stats.extra["local_sum"]

    def slopes(self, stats: RoutingStats, pooled: Pooled) -> dict[str, Tensor]:
        return {"local_sum": 1 / pooled.tokens.clamp(min=1).to(stats.extra["local_sum"].dtype)}


def add_losses(run: Run, mode: str = "exact") -> Run:
    """Train a run on all of them; `mode`: how pooled sums are pooled under accumulation."""
    rule = PoolRule("global", mode)
    for name, loss in (("first", FirstChoiceLoss(rule)), ("importance", ImportanceLoss(rule)),
                       ("mi", MutualInformationLoss(weight=0.5, mode=mode)), ("peak", PeakLoss())):
        run.objective.losses[name] = loss
    for block in run.state.model.layers:
        block.moe.router.token_sums = {"local_sum": peak_sum}
    return run


def by_autograd(probs: list[Tensor], weights: list[Tensor], ids: list[Tensor]) -> Tensor:
    """The same losses of a whole batch, as their formulas say, from probabilities [T, E] of all routers."""
    total = torch.zeros((), dtype=torch.float64)
    for probs_TE, weights_TK, ids_TK in zip(probs, weights, ids):
        tokens, experts = probs_TE.shape
        mean_E = probs_TE.mean(0)
        first_E = torch.bincount(ids_TK[:, 0], minlength=experts).double() / tokens
        importance_E = torch.zeros(experts, dtype=torch.float64).index_add(
            0, ids_TK.flatten(), weights_TK.flatten())
        total = total + 0.3 / len(probs) * experts * (first_E * mean_E).sum()
        total = total + 0.2 / len(probs) * importance_E.var(unbiased=False) / importance_E.mean() ** 2
        entropy = torch.special.entr(probs_TE).sum(-1).mean() - torch.special.entr(mean_E).sum()
        total = total + 0.5 / len(probs) * entropy + 0.4 * probs_TE.amax(-1).square().mean()
    return total
