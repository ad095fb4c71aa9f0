"""Mean entropy of the router's probabilities, in nats: minimizing it makes choices sharper.

    loss = mean over tokens of -sum_i p_i log p_i

It is log E where all experts are as probable, and 0 for a router that is sure. Top-p routing (Huang et al.
2024, arXiv 2403.07652) adds it, so that tokens reach the sum of probabilities with few experts. A
micro-batch contributes the sum over its valid tokens, divided by the valid tokens of the global batch.
"""

from typing import Literal

from torch import Tensor

from moetrain.losses.base import AuxLoss, Pooled
from moetrain.routers.base import RoutingStats


class EntropyLoss(AuxLoss):
    """Mean entropy of the probabilities.

    Args:
        weight: coefficient in the objective; a loss of weight 0 is not computed.
        reduction: mean or sum over routers.
    """

    BOUNDS = {"weight": "0 or more"}

    pool = None

    def __init__(self, *, weight: float = 1e-4, reduction: Literal["mean", "sum"] = "mean") -> None:
        self.weight, self.reduction = weight, reduction

    def value(self, stats: RoutingStats, pooled: Pooled) -> Tensor:
        """Contribution of a micro-batch to the loss of each router, [R], with gradient."""
        return self.slopes(stats, pooled)["entropy_sum"] * stats.entropy_sum

    def slopes(self, stats: RoutingStats, pooled: Pooled) -> dict[str, Tensor]:
        """Gradient of `value` at the sum of entropies: one number for all routers."""
        return {"entropy_sum": 1 / pooled.tokens.clamp(min=1).to(stats.entropy_sum.dtype)}
