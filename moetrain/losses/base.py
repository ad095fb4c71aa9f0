"""Interface of auxiliary losses, which are defined from sums over tokens.

`AuxLoss.value(stats, pooled)` is one micro-batch's *contribution* to the loss of the step, for every router
of a stack (routers/base.py), or for one router whose sums have no leading R. Contributions have global
denominators, so their sum over micro-batches and ranks is the loss, however the batch is split. The pooled
counts are an argument: a loss says over what they are pooled, and never communicates (comm/reduce.py does;
train/count_pool.py decides when).

The same definition reaches backward in one of two ways (`train.aux_loss`): the value is added to the loss
(`added`), or the slopes are injected in backward by an identity node (`injected`, losses/attached.py).

Shapes: E experts, R routers of a stack.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from moetrain.ops.router_sums import TokenSum, TokenValue
from moetrain.routers.base import RoutingStats


class PoolRule(NamedTuple):
    """What the counts of a loss are summed over."""

    # All ranks, or the ranks of a machine.
    scope: Literal["global", "node"]
    # Under accumulation: the whole step, before its first backward (exact); the micro-batches of this turn
    # (sync); the step so far (buffer); the step so far, and the previous step's shares for the rest (warm).
    mode: Literal["exact", "sync", "buffer", "warm"]


class Pooled(NamedTuple):
    """Pooled counts of a stack, as far as they are known before the backward."""

    counts_E: Tensor         # int64 [R, E]; float64 if shares of the previous step stand in for the rest
    tokens: Tensor           # valid tokens of the global batch: the denominator of every loss
    # The sums that losses ask for by `pooled_sums`, by name: float64 [R, ...], without gradient, pooled as
    # counts are. None if no loss asks.
    sums: Mapping[str, Tensor] | None = None
    # Number of experts of each router of the stack, the first of its choices; empty: all choices are experts.
    num_experts: tuple[int, ...] = ()
    # int64 [T] of the micro-batch, if a loss asks for numbers of each token: 1 where the model's most
    # probable token is the target, 0 where it is another one, -1 where no target is scored.
    predicted_T: Tensor | None = None


class AuxLoss(Protocol):
    """An auxiliary loss of routers. It must be linear in the sums that have a gradient.

    A loss of the whole batch that is not linear, such as an entropy of mean probabilities, asks for the
    pooled sums and is linear in those of the micro-batch, with slopes that are its derivative at the pooled
    ones. That is exact in mode exact. A loss that has no such form is one of each micro-batch: its value
    depends on how the batch is split, and its page must say so.
    """

    weight: float            # coefficient in the objective
    reduction: str           # over routers: mean or sum
    token_sums: Mapping[str, TokenSum] = {}      # further sums that it needs, as `RoutingStats.extra`
    pooled_sums: frozenset[str] = frozenset()    # names of sums that are pooled before backward
    # Names of sums that the routers have to bring (`Router.token_sums`). Read from source.
    NEEDS_SUMS: list[str] = []
    token_values: Mapping[str, TokenValue] = {}  # numbers of each token, as `RoutingStats.values`

    @property
    def pool(self) -> PoolRule | None:
        """What counts are pooled over; None if the counts of the micro-batch suffice."""
        ...

    def value(self, stats: RoutingStats, pooled: Pooled) -> Tensor:
        """Contribution of a micro-batch to the loss of each router, [R], with gradient."""
        ...

    def slopes(self, stats: RoutingStats, pooled: Pooled) -> dict[str, Tensor]:
        """Gradient of `value` at the sums in which it is linear, by name of the sum."""
        ...

    def metrics(self, sums: Mapping[str, Mapping[str, Tensor]], tokens: int) -> dict[str, float]:
        """Metrics of a step that the loss brings, besides its value.

        Args:
            sums: float64, by name of a further sum and then by router, over all tokens of the step.
            tokens: valid tokens of the step.
        """
        return {}
