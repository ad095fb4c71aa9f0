"""Pooled counts for balance losses: when they are summed over ranks, and which counts a backward uses.

    CountAllReduce        asynchronous sum of the counts of one or more micro-batches: posted when the last
                          router has decided, before its tokens are dispatched; awaited when the loss is
                          formed, or in backward
    AccumulatedCounts     counts of the step so far, as the mode combines them (PoolRule, losses/base.py)
    PreviousStepCounts    counts of the previous step, which stand for the micro-batches to come in mode warm;
                          part of a run's state

One all-reduce carries the counts of all routers. Mode exact takes one for each step, the other modes one for
each micro-batch.

Shapes: C choices of a router, L = sum of C over routers (the flat buffer), R routers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.profiler import record_function

from moetrain.comm.mesh import Group, Mesh
from moetrain.comm.reduce import sum_over_async
from moetrain.losses.base import PoolRule
from moetrain.parallel.state_shards import StateShard
from moetrain.routers.base import RoutingStats

RouterTotals = Mapping[str, Mapping[str, Tensor]]        # float64 sums by router, then by name


def group_of(rule: PoolRule, mesh: Mesh) -> Group:
    """The ranks over which a rule pools counts."""
    return mesh["node"] if rule.scope == "node" else mesh["batch"]


class CountAllReduce:
    """Asynchronous all-reduce of the counts of all routers, over one or more micro-batches.

    It is posted once all micro-batches are counted. `wait` then returns the sum, int64 [L].

    Args:
        group: the ranks over which counts are pooled.
        routers: number of choices by router, in run order.
        device: device of the counts.
        parts: number of micro-batches whose counts are reduced together.
        sums: names of sums that are pooled beside the counts, in a second all-reduce, of float64.
    """

    def __init__(self, group: Group, routers: Mapping[str, int], device: torch.device, parts: int = 1,
                 sums: Sequence[str] = ()) -> None:
        self.group, self.routers, self.parts, self.sums = group, tuple(routers), parts, tuple(sums)
        self.total: RouterTotals = {}
        self._sums_arrived: Callable[[], Tensor] | None = None
        self.counts_L = torch.zeros(sum(routers.values()), dtype=torch.int64, device=device)
        self.wait: Callable[[], Tensor] = self._missing if routers else lambda: self.counts_L

    def micro_batch(self) -> Callable[[str, RoutingStats], None]:
        """Return the `RouterContext.on_counts` of the next micro-batch, which collects its routers' counts.

        The first counts of each router are taken: a block that is recomputed in backward reports them again.
        """
        told, known = dict[str, RoutingStats](), set[str]()

        def on_counts(router: str, stats: RoutingStats) -> None:
            if router not in known:
                known.add(router)
                told[router] = stats
                if len(told) == len(self.routers):
                    self._add({router: told[router] for router in self.routers})
                    told.clear()                         # no graph is held

        return on_counts

    def _add(self, told: Mapping[str, RoutingStats]) -> None:
        assert self.parts > 0, "more micro-batches than were expected"
        self.counts_L += torch.cat([stats.counts_E for stats in told.values()])
        if self.sums:
            self.total = add_totals(self.total, {router: totals_of(stats, self.sums)
                                                 for router, stats in told.items()})
        self.parts -= 1
        if self.parts == 0:
            with record_function("counts: post"):
                arrived = sum_over_async(self.group, self.counts_L)
                if self.sums:
                    self._sums_arrived = sum_over_async(self.group, flat_totals(self.total))
            self.wait = record_function("counts: wait")(arrived)

    def wait_for_sums(self) -> "RouterTotals | None":
        """Wait for the pooled sums, once, after the counts; None if none were asked for."""
        if self._sums_arrived is None:
            return None
        numbers = iter(self._sums_arrived().split([tensor.numel() for sums in self.total.values()
                                                   for tensor in sums.values()]))
        return {router: {name: next(numbers).view(tensor.shape) for name, tensor in sums.items()}
                for router, sums in self.total.items()}

    def _missing(self) -> Tensor:
        raise AssertionError(f"{self.parts} micro-batches have not been counted")


class AccumulatedCounts:
    """Counts of the step so far, extended as `mode` says.

    Args:
        mode: `sync`, `buffer` or `warm` (PoolRule, losses/base.py).
        routers: number of choices by router, in run order.
        tokens: int64 scalar, valid tokens of the global batch.
        prior: counts of the previous step, for mode warm.
    """

    def __init__(self, mode: str, routers: Mapping[str, int], tokens: Tensor,
                 prior: "PreviousStepCounts | None") -> None:
        self.mode, self.tokens, self.prior = mode, tokens, prior
        self.sums: RouterTotals = {}
        self.total_L = torch.zeros(sum(routers.values()), dtype=torch.int64, device=tokens.device)

    def add_sums(self, sums: RouterTotals | None) -> RouterTotals | None:
        """Add the pooled sums of a micro-batch; return those by which its losses are formed."""
        if sums is None or self.mode == "sync":
            return sums
        assert self.mode == "buffer", "a loss that pools sums cannot be estimated by the previous step (warm)"
        self.sums = add_totals(self.sums, sums)
        return self.sums

    def add(self, counts_L: Tensor, *, last: bool) -> Tensor:
        """Add the pooled counts of a micro-batch; return the counts from which its balance loss takes f.

        Args:
            counts_L: int64 [L], summed over ranks.
            last: whether this is the last micro-batch of the step.

        Returns:
            Counts [L]: int64, or float64 where shares of the previous step stand for the rest.
        """
        self.total_L += counts_L
        if self.mode == "sync":
            return counts_L
        if self.mode == "buffer" or last:
            return self.total_L.clone()
        assert self.prior is not None, "counts of the previous step are kept in mode warm"
        return self.prior.complete(self.total_L, self.tokens)


class PreviousStepCounts:
    """Counts of the previous step, from which those of the rest of a step are estimated.

    `counts_L` and `tokens` are 0 before the first step.

    Args:
        routers: number of choices by router, in run order.
        drift: a router whose shares have moved by more than this from one step to the next (total variation,
            0 to 1) is not estimated.
        device: device of the counts.
    """

    def __init__(self, routers: Mapping[str, int], drift: float, device: torch.device) -> None:
        self.sizes, self.drift = list(routers.values()), drift
        self.counts_L = torch.zeros(sum(self.sizes), dtype=torch.int64, device=device)
        self.usable_R = torch.zeros(len(self.sizes), dtype=torch.int64, device=device)
        self.tokens = torch.zeros(1, dtype=torch.int64, device=device)

    def complete(self, total_L: Tensor, tokens: Tensor) -> Tensor:
        """Estimate the counts of a whole step.

        Args:
            total_L: int64 [L], counts of the step so far.
            tokens: int64 scalar, valid tokens of the whole step.

        Returns:
            float64 [L]: the counts so far, and the rest of the slots by the shares of the previous step.
        """
        parts = []
        for total_C, prior_C, usable in zip(
                total_L.split(self.sizes), self.counts_L.split(self.sizes), self.usable_R):
            slots = prior_C.sum().double()
            rest = (slots * tokens / self.tokens.clamp(min=1) - total_C.sum()).clamp(min=0)
            parts.append(total_C + usable * rest * prior_C / slots.clamp(min=1))
        return torch.cat(parts) if parts else total_L.double()

    def observe(self, counts_L: Tensor, tokens: Tensor) -> None:
        """Keep the pooled counts [L] of a finished step, and its valid tokens."""
        for router, (now_C, before_C) in enumerate(
                zip(counts_L.split(self.sizes), self.counts_L.split(self.sizes))):
            moved = (shares(now_C) - shares(before_C)).abs().sum() / 2
            self.usable_R[router] = (moved <= self.drift) | ~before_C.any()
        self.counts_L.copy_(counts_L)
        self.tokens.copy_(tokens)

    def state_shards(self) -> Iterator[StateShard]:
        """Iterate over the tensors that a checkpoint keeps."""
        for name, tensor in (("counts", self.counts_L), ("usable", self.usable_R), ("tokens", self.tokens)):
            yield StateShard(f"prior.{name}", tuple(tensor.shape), 0, tensor, "batch")


def totals_of(stats: RoutingStats, names: Sequence[str]) -> dict[str, Tensor]:
    """The sums of one router that losses pool, float64 and without gradient, by name."""
    named = stats.named()
    return {name: named[name].detach().double() for name in names}


def add_totals(ours: RouterTotals, theirs: RouterTotals) -> RouterTotals:
    """Add up the sums of micro-batches."""
    if not ours:
        return theirs
    return {router: {name: ours[router][name] + tensor for name, tensor in sums.items()}
            for router, sums in theirs.items()}


def flat_totals(totals: RouterTotals) -> Tensor:
    """Concatenate sums of all routers, float64, by router and name."""
    return torch.cat([tensor.flatten() for sums in totals.values() for tensor in sums.values()])


def shares(counts_C: Tensor) -> Tensor:
    """Share of each choice in the counts of a router, float64 [C]; zeros if nothing was routed."""
    return counts_C.double() / counts_C.sum().clamp(min=1)
