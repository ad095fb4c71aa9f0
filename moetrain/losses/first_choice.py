"""First-choice balance (GShard, 2006.16668; also of X-MoE and DeepSpeed's top-2 gate).

    L = E * sum_i f_i P_i        f_i: share of the tokens that take i first;  P_i: mean probability

As losses/load_balance.py, but that second choices do not count: with a random second expert they follow from
the probabilities. It is 1 for perfect balance. The paper writes 1/E sum_i f_i P_i; its code multiplies by
E^2.

Shapes: E experts, R routers.
"""

from typing import Literal

from torch import Tensor

from moetrain.losses.base import Pooled
from moetrain.losses.load_balance import balance_slope
from moetrain.losses.scoped import ScopedLoss
from moetrain.ops.router_sums import first_choices
from moetrain.routers.base import RoutingStats


class FirstChoiceLoss(ScopedLoss):
    """Load-balancing loss of first choices.

    Args:
        weight: coefficient in the objective; a loss of weight 0 is not computed.
        scope: what f is counted over: global, node or micro.
        mode: how counts are pooled under accumulation (`PoolRule` in losses/base.py); unused with scope
            micro.
        reduction: mean or sum over routers.
    """

    summed = frozenset({"first_E"})
    token_sums = {"first_E": first_choices}

    def __init__(self, *, weight: float = 0.01, scope: Literal["global", "node", "micro"] = "global",
                 mode: Literal["exact", "sync", "buffer"] = "exact",
                 reduction: Literal["mean", "sum"] = "mean") -> None:
        super().__init__(weight=weight, scope=scope, mode=mode, reduction=reduction)

    def value(self, stats: RoutingStats, pooled: Pooled) -> Tensor:
        """Contribution of a micro-batch to the loss of each router, [R], with gradient."""
        return (self.slopes(stats, pooled)["prob_sum_E"] * stats.prob_sum_E).sum(-1)

    def slopes(self, stats: RoutingStats, pooled: Pooled) -> dict[str, Tensor]:
        """Gradient of `value` at the probability sums, [R, E]."""
        first_RE = self.over_scope(stats, pooled, "first_E")
        return {"prob_sum_E": balance_slope(first_RE, pooled.tokens, stats.prob_sum_E.dtype)}
