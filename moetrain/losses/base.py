"""Auxiliary losses: defined once, from sums over tokens.

`AuxLoss.value(stats, pooled)` is one micro-batch's *contribution* to the loss of the step for one router. Contributions
carry global denominators, so adding them over micro-batches and ranks gives the loss, whatever the split. The pooled
counts are an argument: a loss never communicates (comm/reduce.py does, train/loop.py decides when).

This release has one carrier of a loss: `returned` (the value is added to the objective).
"""

from typing import NamedTuple, Protocol

from torch import Tensor

from moetrain.routers.base import RoutingStats


class Pooled(NamedTuple):
    """One router's sums over the pool of the step (int64), as far as they are known before the first backward."""

    counts_E: Tensor
    tokens: Tensor           # valid tokens of the whole global batch: the denominator of every loss


class AuxLoss(Protocol):
    weight: float
    reduction: str           # over routers: mean or sum
    needs_pool: bool         # the pooled counts must be known before the backward

    def value(self, stats: RoutingStats, pooled: Pooled) -> Tensor: ...

    def slopes(self, stats: RoutingStats, pooled: Pooled) -> dict[str, Tensor]:
        """Gradient of `value` with respect to the sums it is linear in, by field of RoutingStats."""
        ...
