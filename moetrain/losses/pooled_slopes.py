"""Base class of losses that are a sum over choices of a slope from pooled counts times a sum over tokens.

    value = sum_i slope_i S_i / N      slope: a function of counts, a constant for autograd
                                       S: a sum of the micro-batch, by default that of its probabilities
                                       N: valid tokens of the global batch

Balance losses of this family differ in what an overloaded choice is charged. Counts are pooled as those of
the balance loss are (losses/load_balance.py): with scope global and mode exact, the value does not depend on
how the batch is split; with scope micro it depends on ranks and accumulation.

Shapes: C choices of a router, R routers.
"""

from typing import Literal

import torch
from torch import Tensor

from moetrain.losses.base import Pooled, PoolRule
from moetrain.losses.scoped import ScopedLoss
from moetrain.ops.pinned import to_device
from moetrain.routers.base import RoutingStats


class PooledSlopeLoss(ScopedLoss):
    """Loss that subclasses define by `slope`. Arguments as `ScopedLoss`; the scope is that of counts."""

    # Name of the sum that is weighed, [R, C].
    of = "prob_sum_E"
    # Whether `slope` reads how many tokens were counted.
    counts_tokens = False

    def __init__(self, *, weight: float = 1e-2, scope: Literal["global", "node", "micro"] = "global",
                 mode: Literal["exact", "sync", "buffer", "warm"] = "exact",
                 reduction: Literal["mean", "sum"] = "mean") -> None:
        super().__init__(weight=weight, scope=scope, mode=mode, reduction=reduction)
        # The tokens that were counted, where these are neither the step's nor the micro-batch's.
        if self.counts_tokens and self.pool not in (None, PoolRule("global", "exact")):
            self.pooled_sums = frozenset({"tokens"})

    def slope(self, counts_RC: Tensor, tokens_R: Tensor, pooled: Pooled) -> Tensor:
        """What is charged for each unit of the sum.

        Args:
            counts_RC: float64 [R, C], slots of each choice.
            tokens_R: float64 [R], or a scalar: the tokens that were counted, 1 or more.
            pooled: the numbers of experts.

        Returns:
            float64 [R, C].
        """
        raise TypeError(f"{type(self).__name__} does not define slope")

    def value(self, stats: RoutingStats, pooled: Pooled) -> Tensor:
        """Contribution of a micro-batch to the loss of each router, [R], with gradient."""
        return (self.slopes(stats, pooled)[self.of] * stats.named()[self.of]).sum(-1)

    def slopes(self, stats: RoutingStats, pooled: Pooled) -> dict[str, Tensor]:
        """Gradient of `value` at the sum, [R, C]."""
        counts_RC, tokens_R = pooled.counts_E, pooled.tokens
        if self.scope == "micro":
            counts_RC, tokens_R = stats.counts_E, stats.tokens
        elif self.pooled_sums:
            assert pooled.sums is not None
            tokens_R = pooled.sums["tokens"]
        slope_RC = self.slope(counts_RC.double(), tokens_R.clamp(min=1).double(), pooled)
        slope_RC = slope_RC / pooled.tokens.clamp(min=1).double()
        return {self.of: slope_RC.to(stats.named()[self.of].dtype)}


def are_experts(counts_RC: Tensor, pooled: Pooled) -> Tensor:
    """Which choices are experts: bool, of the shape of the counts. The others follow the experts."""
    numbers = pooled.num_experts or counts_RC.shape[-1:]
    if all(number == counts_RC.shape[-1] for number in numbers):
        return torch.ones_like(counts_RC, dtype=torch.bool)
    experts_R1 = torch.tensor(numbers).view(*counts_RC.shape[:-1], 1)
    return to_device(torch.arange(counts_RC.shape[-1]) < experts_R1, counts_RC.device)
