"""The counts that a balance loss wants: when they are summed over ranks, and what is known of the step at
each backward.

    CountAllReduce    counts of one or more micro-batches on their way: posted when the last router has decided, before its tokens
               travel, and awaited when a loss is formed, or in backward
    AccumulatedCounts      what of the step is known so far, by the mode (losses/base.py PoolRule)
    PreviousStepCounts the counts of the step before, which stand for what is still to come in mode warm; part
    of a run's state

One all-reduce of all routers' counts, one a step in mode exact and one a micro-batch in the others.

Shapes: L = sum of E over routers, the flat buffer.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor
from torch.profiler import record_function

from moetrain.comm.mesh import Group, Mesh
from moetrain.comm.reduce import sum_over_async
from moetrain.losses.base import PoolRule
from moetrain.parallel.state_shards import StateShard


def group_of(rule: PoolRule, mesh: Mesh) -> Group:
    return mesh["node"] if rule.scope == "node" else mesh["batch"]


class CountAllReduce:
    """parts: micro-batches whose counts travel together."""

    def __init__(self, group: Group, routers: Mapping[str, int], device: torch.device, parts: int = 1) -> None:
        self.group, self.routers, self.parts = group, tuple(routers), parts
        self.counts_L = torch.zeros(sum(routers.values()), dtype=torch.int64, device=device)
        self.wait: Callable[[], Tensor] = self._missing if routers else lambda: self.counts_L

    def micro_batch(self) -> Callable[[str, Tensor], None]:
        """What the routers of a micro-batch tell their counts (RouterContext.on_counts), all of them; a block
        that runs again in backward says nothing new.
        """
        told: dict[str, Tensor] = {}

        def on_counts(router: str, counts_E: Tensor) -> None:
            if router not in told:
                told[router] = counts_E
                if len(told) == len(self.routers):
                    self._add(torch.cat([told[router] for router in self.routers]))

        return on_counts

    def _add(self, counts_L: Tensor) -> None:
        assert self.parts > 0, "more micro-batches than were expected"
        self.counts_L += counts_L
        self.parts -= 1
        if self.parts == 0:
            with record_function("counts: post"):
                arrived = sum_over_async(self.group, self.counts_L)
            self.wait = record_function("counts: wait")(arrived)

    def _missing(self) -> Tensor:
        raise AssertionError(f"{self.parts} micro-batches have not been counted")


class AccumulatedCounts:
    """mode: sync, buffer or warm. tokens: valid tokens of the global batch."""

    def __init__(self, mode: str, routers: Mapping[str, int], tokens: Tensor, prior: "PreviousStepCounts | None") -> None:
        self.mode, self.tokens, self.prior = mode, tokens, prior
        self.total_L = torch.zeros(sum(routers.values()), dtype=torch.int64, device=tokens.device)

    def add(self, counts_L: Tensor, *, last: bool) -> Tensor:
        """The counts [L] whose shares are f for the micro-batches of this turn, once their pooled counts are known."""
        self.total_L += counts_L
        if self.mode == "sync":
            return counts_L
        if self.mode == "buffer" or last:
            return self.total_L.clone()
        return self.prior.complete(self.total_L, self.tokens)


class PreviousStepCounts:
    """counts_L, tokens: of the step before; 0 where there is none. drift: a router whose shares have moved by
    more than this (total variation, 0 to 1) from one step to the next has none.
    """

    def __init__(self, routers: Mapping[str, int], drift: float, device: torch.device) -> None:
        self.sizes, self.drift = list(routers.values()), drift
        self.counts_L = torch.zeros(sum(self.sizes), dtype=torch.int64, device=device)
        self.usable_R = torch.zeros(len(self.sizes), dtype=torch.int64, device=device)
        self.tokens = torch.zeros(1, dtype=torch.int64, device=device)

    def complete(self, total_L: Tensor, tokens: Tensor) -> Tensor:
        """What is known of a step, and the rest of it as in the step before: float64 [L]."""
        parts = []
        for total_E, prior_E, usable in zip(total_L.split(self.sizes), self.counts_L.split(self.sizes), self.usable_R):
            slots = prior_E.sum().double()
            rest = (slots * tokens / self.tokens.clamp(min=1) - total_E.sum()).clamp(min=0)
            parts.append(total_E + usable * rest * prior_E / slots.clamp(min=1))
        return torch.cat(parts) if parts else total_L.double()

    def observe(self, counts_L: Tensor, tokens: Tensor) -> None:
        """The pooled counts of a whole step."""
        for router, (now_E, before_E) in enumerate(zip(counts_L.split(self.sizes), self.counts_L.split(self.sizes))):
            moved = (shares(now_E) - shares(before_E)).abs().sum() / 2
            self.usable_R[router] = (moved <= self.drift) | ~before_E.any()
        self.counts_L.copy_(counts_L)
        self.tokens.copy_(tokens)

    def state_shards(self) -> Iterator[StateShard]:
        for name, tensor in (("counts", self.counts_L), ("usable", self.usable_R), ("tokens", self.tokens)):
            yield StateShard(f"prior.{name}", tuple(tensor.shape), 0, tensor, "batch")


def shares(counts_E: Tensor) -> Tensor:
    return counts_E.double() / counts_E.sum().clamp(min=1)
