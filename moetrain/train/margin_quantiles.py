"""Quantiles of the margins of a step over the global batch, for routers that balance by them.

A router never communicates. One that wants quantiles says of what share (`Router.margin_quantile`), hands its
margins to `RouterContext.on_margins` when it decides, and is given the quantiles before `Router.end_of_step`.
In between stands this:

    last router of the last micro-batch     count the first digit of all margins, post its sum over ranks
    after the last backward                 wait for it, count the second digit, post
    after the sums of the step              wait for it, count the third digit, post
    after the optimizer                     wait for it: the quantiles

Each sum is under way while something else computes, and is one all-reduce of int32 for all routers. No
histogram of fixed bins is exact, and the later digits are not known before all margins are, so a rank keeps
its margins from forward to the end of the step: 4 bytes for each valid or padded token of all its
micro-batches, expert and router. They have no graph, and do not depend on what else is kept for backward.

A router tells once for each micro-batch: the forward pass that backward follows asks, and no other. Neither
the count pass (train/micro_batches.py) nor evaluation asks, and what a recomputed block tells again is not
taken.

Shapes: T tokens of a micro-batch, E experts, N = tokens of this rank's step, L = sum of E over routers, B
values of a digit (ops/order_statistics.py).
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.profiler import record_function

from moetrain.comm.mesh import Group
from moetrain.comm.reduce import sum_over_async
from moetrain.ops.order_statistics import (
    DIGITS,
    FIRST,
    digit_counts,
    next_base,
    num_finite,
    order_keys,
    values_of_keys,
)
from moetrain.routers.base import Router

OnMargins = Callable[[str, Tensor], None]                # RouterContext.on_margins


class MarginQuantiles:
    """Exact quantiles of the margins of one step, which are summed up while the step goes on.

    A router that decides in several passes has one quantile for each expert, over all of them.

    Args:
        group: the ranks of the global batch.
        routers: routers of the model by name; those without `margin_quantile` take no part.
        tokens: tokens of each micro-batch of this rank, padding included.
    """

    def __init__(self, group: Group, routers: Mapping[str, Router], tokens: Sequence[int]) -> None:
        self.group, self.parts = group, len(tokens)
        self.routers = {name: router for name, router in routers.items() if router.margin_quantile}
        self._passes = Counter(self.routers.values())    # each router, in run order
        self._width = sum(tokens) * max(self._passes.values(), default=0)
        self._margins_LN: Tensor | None = None           # infinite where there is none; then their keys
        self._filled = dict.fromkeys(self._passes, 0)    # columns of each router that are in use
        self._base_L: Tensor | None = None               # the digits of the quantiles that are known
        self._rank_L: Tensor | None = None               # margins below the quantiles
        self._digit = 0
        self._arrived: Callable[[], Tensor] = self._missing

    def micro_batch(self) -> OnMargins | None:
        """Return the `RouterContext.on_margins` of the next micro-batch; None if nobody wants quantiles."""
        if not self.routers:
            return None
        told: set[str] = set()

        def on_margins(name: str, margins_TE: Tensor) -> None:
            if name in told:
                return
            told.add(name)
            self._keep(self.routers[name], margins_TE)
            if len(told) == len(self.routers):
                self.parts -= 1
                assert self.parts >= 0, "more micro-batches than were expected"
                if self.parts == 0:
                    self._post()

        return on_margins

    def _keep(self, router: Router, margins_TE: Tensor) -> None:
        """Copy margins to the next columns of the rows of their router."""
        if self._margins_LN is None:
            self._margins_LN = torch.full((sum(self._sizes), self._width), float("inf"),
                                          device=margins_TE.device)
        first = self._filled[router]
        self._filled[router] += len(margins_TE)
        assert self._filled[router] <= self._width, (self._filled[router], self._width)
        rows = self._by_router(self._margins_LN)[router]
        rows[:, first:self._filled[router]] = margins_TE.T

    @property
    def _sizes(self) -> list[int]:
        return [router.num_experts for router in self._passes]

    def _by_router(self, of_L: Tensor) -> dict[Router, Tensor]:
        """Split the first dimension by router."""
        return dict(zip(self._passes, of_L.split(self._sizes)))

    @record_function("quantiles: count and post")
    def _post(self) -> None:
        """Count the next digit of the margins of all routers, and start the sum over ranks."""
        assert self._margins_LN is not None
        if self._digit == 0:
            self._margins_LN = order_keys(self._margins_LN)
            self._base_L = self._margins_LN.new_full(self._margins_LN.shape[:1], FIRST)
        self._arrived = sum_over_async(self.group, digit_counts(self._margins_LN, self._base_L, self._digit))

    def advance(self) -> None:
        """Wait for the counts of a digit, and post those of the next one."""
        if not self.routers:
            return
        with record_function("quantiles: wait"):
            up_to_LB = self._arrived().cumsum(1, dtype=torch.int32)
        if self._rank_L is None:
            self._rank_L = torch.cat([
                _rank_of(router.margin_quantile, values_E)
                for router, values_E in self._by_router(num_finite(up_to_LB)).items()]).int()
        self._base_L = next_base(up_to_LB, self._base_L, self._rank_L, self._digit)
        self._digit += 1
        if self._digit < len(DIGITS):
            self._post()

    def quantiles(self) -> dict[Router, Tensor]:
        """Wait for the last digit; return the quantiles, float32 [E], by router.

        That of an expert without any margin is infinity.
        """
        if not self.routers:
            return {}
        self.advance()
        assert self._digit == len(DIGITS) and self._base_L is not None, self._digit
        return self._by_router(values_of_keys(self._base_L))

    def _missing(self) -> Tensor:
        raise AssertionError(f"{self.parts} micro-batches have not told all margins")


def _rank_of(quantile: tuple[int, int] | None, values_E: Tensor) -> Tensor:
    """Rank of a quantile among so many values: int64 [E]."""
    assert quantile is not None, "routers without a quantile are not asked"
    return values_E * quantile[0] // quantile[1]
