"""Losses of sums that a loss brings, or that are pooled before backward; in tests only."""

from collections.abc import Mapping

import torch
from torch import Tensor

from moetrain.losses.base import AuxLoss, Pooled
from moetrain.losses.first_choice import FirstChoiceLoss
from moetrain.losses.importance import ImportanceLoss
from moetrain.losses.mutual_information import MutualInformationLoss
from moetrain.ops.router_sums import Decided
from moetrain.routers.base import RoutingStats
from moetrain.train.state import Run


class MeteredFirstChoiceLoss(FirstChoiceLoss):
    """With a metric of its own: the largest share of first choices, mean over routers."""

    def metrics(self, sums: Mapping[str, Mapping[str, Tensor]], tokens: int) -> dict[str, float]:
        largest = [first_E.max().item() for first_E in sums["first_E"].values()]
        return {"moe/first_share": sum(largest) / len(largest) / max(1, tokens)}


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
    for name, loss in (("first", MeteredFirstChoiceLoss(weight=0.3, mode=mode)),
                       ("importance", ImportanceLoss(weight=0.2, mode=mode)),
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
