"""Router z-loss (ST-MoE): the mean over tokens of logsumexp(logits)^2, which keeps logits small.

A micro-batch contributes the sum over its valid tokens, divided by the valid tokens of the global batch.
"""

from typing import Literal

from torch import Tensor

from moetrain.losses.base import AuxLoss, Pooled
from moetrain.routers.base import RoutingStats


class ZLoss(AuxLoss):
    """Router z-loss.

    Args:
        weight: coefficient in the objective; a loss of weight 0 is not computed.
        reduction: mean or sum over routers.
    """

    BOUNDS = {"weight": "0 or more"}

    pool = None

    def __init__(self, *, weight: float = 1e-3, reduction: Literal["mean", "sum"] = "mean") -> None:
        self.weight, self.reduction = weight, reduction

    def value(self, stats: RoutingStats, pooled: Pooled) -> Tensor:
        """Contribution of a micro-batch to the loss of each router, [R], with gradient."""
        return self.slopes(stats, pooled)["lse2_sum"] * stats.lse2_sum

    def slopes(self, stats: RoutingStats, pooled: Pooled) -> dict[str, Tensor]:
        """Gradient of `value` at the sum of squared log-sum-exps: one number for all routers."""
        return {"lse2_sum": 1 / pooled.tokens.clamp(min=1).to(stats.lse2_sum.dtype)}
