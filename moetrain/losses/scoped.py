"""Losses of sums over a scope: the global batch, the ranks of a machine, or one micro-batch.

    ScopedLoss       base class: the sums over the scope, by name
    VariationLoss    squared coefficient of variation of a sum over the choices of a router

    CV^2(s) = Var(s) / Mean(s)^2 = C sum_i s_i^2 / (sum_i s_i)^2 - 1        C choices

CV^2 is not linear in s. A micro-batch of n tokens contributes its share n / N of the value, N the valid
tokens of the global batch, and is linear in its own sums, with the derivative at the sums of the scope as
slope. So with scope global and mode exact, value and gradient are those of the whole batch, however it is
split. In the other scopes and modes the loss is the mean over scopes, weighed by tokens.

Shapes: C choices, R routers.
"""

from typing import Literal

from torch import Tensor

from moetrain.losses.base import AuxLoss, Pooled, PoolRule
from moetrain.routers.base import RoutingStats


class ScopedLoss(AuxLoss):
    """Base class of losses of counts or sums over a scope. Subclasses name such sums in `summed`.

    Args:
        weight: coefficient in the objective; a loss of weight 0 is not computed.
        scope: what is summed over: global, node or micro.
        mode: how they are pooled under accumulation (`PoolRule` in losses/base.py); unused with scope micro.
            Losses with `summed` do not take warm.
        reduction: mean or sum over routers.
    """

    BOUNDS = {"weight": "0 or more"}

    # Names of the sums over the scope that the loss needs.
    summed: frozenset[str] = frozenset()

    def __init__(self, *, weight: float = 0.01, scope: Literal["global", "node", "micro"] = "global",
                 mode: Literal["exact", "sync", "buffer", "warm"] = "exact",
                 reduction: Literal["mean", "sum"] = "mean") -> None:
        self.weight, self.scope, self.mode, self.reduction = weight, scope, mode, reduction
        self.pooled_sums = frozenset() if self.pool is None else self.summed

    @property
    def pool(self) -> PoolRule | None:
        """What counts and sums are pooled over; None if those of the micro-batch suffice."""
        return PoolRule(self.scope, self.mode) if self.scope != "micro" and self.weight > 0 else None

    def over_scope(self, stats: RoutingStats, pooled: Pooled, name: str) -> Tensor:
        """Sum over the scope, float64 and without gradient, of each router of a stack."""
        if self.pool is None:
            return stats.named()[name].detach().double()
        assert pooled.sums is not None
        return pooled.sums[name]


class VariationLoss(ScopedLoss):
    """Base class of losses that are the CV^2 of one sum, `measured`. Arguments as `ScopedLoss`."""

    measured = ""

    def value(self, stats: RoutingStats, pooled: Pooled) -> Tensor:
        """Contribution of a micro-batch to the loss of each router, [R], with gradient."""
        total_RC, here_RC = self.over_scope(stats, pooled, self.measured), stats.named()[self.measured]
        sum_R = total_RC.sum(-1)
        variation_R = total_RC.shape[-1] * total_RC.square().sum(-1) / sum_R.where(sum_R > 0, 1).square() - 1
        share_R = variation_R.where(sum_R > 0, 0) * stats.tokens / pooled.tokens.clamp(min=1)
        if not here_RC.requires_grad:
            return share_R.to(here_RC.dtype)
        linear_R = (self.slopes(stats, pooled)[self.measured] * here_RC).sum(-1)
        return linear_R + (share_R.to(here_RC.dtype) - linear_R.detach())

    def slopes(self, stats: RoutingStats, pooled: Pooled) -> dict[str, Tensor]:
        """Gradient of `value` at the sum, by its name: [R, C]; nothing if the sum has no gradient."""
        here_RC = stats.named()[self.measured]
        total_RC = self.over_scope(stats, pooled, self.measured)
        sum_R1 = total_RC.sum(-1, keepdim=True)
        safe_R1 = sum_R1.where(sum_R1 > 0, 1)
        squares_R1 = total_RC.square().sum(-1, keepdim=True)
        slope_RC = 2 * total_RC.shape[-1] * (total_RC / safe_R1.square() - squares_R1 / safe_R1 ** 3)
        share_R = self.over_scope(stats, pooled, "tokens") / pooled.tokens.clamp(min=1)
        return {self.measured: (slope_RC * share_R[..., None]).to(here_RC.dtype)}
