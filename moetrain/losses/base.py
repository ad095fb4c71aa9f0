"""Auxiliary losses: defined once, from sums over tokens.

`AuxLoss.value(stats, pooled)` is one micro-batch's *contribution* to the loss of the step, of every router of a stack
(routers/base.py), or of one router whose sums have no R in front. Contributions carry global denominators, so adding them over
micro-batches and ranks gives the loss, whatever the split. The pooled counts are an argument: a loss says what it wants them
pooled over and never communicates (comm/reduce.py does, train/count_pool.py decides when).

Two carriers bring the same definition to backward: `returned`, the value is added to the objective, and `attached`
(losses/attached.py), the slopes are injected by an identity node.
"""

from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from moetrain.routers.base import RoutingStats


class PoolRule(NamedTuple):
    """Which counts a loss wants.

    scope: of all ranks (global) or of those of a machine (node).
    mode, under accumulation: of the whole step before its first backward (exact); of the ranks' micro-batches of this turn
    (sync); of the step so far (buffer); the same, and for what is still to come the shares of the step before (warm).
    """

    scope: Literal["global", "node"]
    mode: Literal["exact", "sync", "buffer", "warm"]


class Pooled(NamedTuple):
    """A stack's sums over the pool, as far as they are known before the backward."""

    counts_E: Tensor         # int64 [R, E]; float64 where the shares of another step stand for what is to come
    tokens: Tensor           # valid tokens of the whole global batch: the denominator of every loss


class AuxLoss(Protocol):
    weight: float
    reduction: str           # over routers: mean or sum
    pool: PoolRule | None    # None: the counts of the micro-batch will do

    def value(self, stats: RoutingStats, pooled: Pooled) -> Tensor:
        """[R]"""
        ...

    def slopes(self, stats: RoutingStats, pooled: Pooled) -> dict[str, Tensor]:
        """Gradient of `value` with respect to the sums it is linear in, by field of RoutingStats."""
        ...
