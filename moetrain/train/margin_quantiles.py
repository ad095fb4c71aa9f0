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

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.profiler import record_function

from moetrain.comm.mesh import Group
from moetrain.comm.reduce import sum_over_async
from moetrain.ops.order_statistics import (
    DIGITS,
    digit_counts,
    next_digit,
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
        parts: micro-batches of a rank.
    """

    def __init__(self, group: Group, routers: Mapping[str, Router], parts: int) -> None:
        self.group, self.parts = group, parts
        self.routers = {name: router for name, router in routers.items() if router.margin_quantile}
        self._keys: dict[Router, list[Tensor]] = {router: [] for router in self.routers.values()}   # [E, T]
        self._found_L: Tensor | None = None              # the digits of the quantiles that are known
        self._rank_L: Tensor | None = None
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
            self._keys[self.routers[name]].append(order_keys(margins_TE.T.float()))
            if len(told) == len(self.routers):
                self.parts -= 1
                assert self.parts >= 0, "more micro-batches than were expected"
                if self.parts == 0:
                    self._keys = {router: [torch.cat(parts, 1)] for router, parts in self._keys.items()}
                    self._post()

        return on_margins

    @record_function("quantiles: count and post")
    def _post(self) -> None:
        """Count the next digit of the margins of all routers, and start the sum over ranks."""
        sizes = [router.num_experts for router in self._keys]
        found = [None] * len(sizes) if self._found_L is None else self._found_L.split(sizes)
        self._arrived = sum_over_async(self.group, torch.cat([
            digit_counts(keys_EN, found_E, self._digit)
            for (keys_EN,), found_E in zip(self._keys.values(), found)]))

    def advance(self) -> None:
        """Wait for the counts of a digit, and post those of the next one."""
        if not self.routers:
            return
        with record_function("quantiles: wait"):
            counts_LB = self._arrived()
        if self._rank_L is None:
            self._rank_L = torch.cat([
                values_E * router.margin_quantile[0] // router.margin_quantile[1] for router, values_E in
                zip(self._keys, num_finite(counts_LB).split([router.num_experts for router in self._keys]))])
        self._found_L, self._rank_L = next_digit(counts_LB, self._found_L, self._rank_L)
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
        assert self._digit == len(DIGITS) and self._found_L is not None, self._digit
        sizes = [router.num_experts for router in self._keys]
        return dict(zip(self._keys, values_of_keys(self._found_L).split(sizes)))

    def _missing(self) -> Tensor:
        raise AssertionError(f"{self.parts} micro-batches have not told all margins")
