"""Router z-loss (ST-MoE): the mean over tokens of logsumexp(logits)^2 keeps logits small.

A micro-batch contributes its sum over the valid tokens of the global batch.
"""

from typing import Literal

from torch import Tensor

from moetrain.losses.base import AuxLoss, Pooled
from moetrain.routers.base import RoutingStats


class ZLoss(AuxLoss):
    """weight: coefficient. reduction: mean or sum over routers."""

    BOUNDS = {"weight": "0 or more"}

    pool = None

    def __init__(self, *, weight: float = 1e-3, reduction: Literal["mean", "sum"] = "mean") -> None:
        self.weight, self.reduction = weight, reduction

    def value(self, stats: RoutingStats, pooled: Pooled) -> Tensor:
        return self.slopes(stats, pooled)["lse2_sum"] * stats.lse2_sum

    def slopes(self, stats: RoutingStats, pooled: Pooled) -> dict[str, Tensor]:
        return {"lse2_sum": 1 / pooled.tokens.clamp(min=1).to(stats.lse2_sum.dtype)}
