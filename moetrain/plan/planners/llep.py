"""Least-loaded expert parallelism: what does not fit at an expert's home spills, in pieces, to the least loaded position.

arXiv 2601.17111; rules from `SalesforceAIResearch/LeastLoadedEP`, llep/gpt_oss_llep.py. Experts by load, descending: a
position's effective load is what it was given plus the load of its own experts still to come, and its capacity
`capacity` times the mean. The home takes what fits; the rest goes to whichever position has the smallest effective load,
in pieces not smaller than `min_rows` unless it is the last; what fits nowhere goes to the least loaded of all. Below an
imbalance of `threshold` nothing is done. An expert's rows are cut by their global offset, blind to where they are.

Published without a limit on copies: here a position that has no room left for another expert is not asked.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from moetrain.plan.cost.machine import Costs, Topology
from moetrain.plan.placement import LayerPlacement
from moetrain.plan.planners.base import (
    LayerPlan,
    Planner,
    Rule,
    copies_per_position,
    hottest_first,
    loads_by_expert,
)


class LeastLoaded(Planner):
    """capacity: of a position, in means (alpha; 1.0 to 1.1 published). min_rows: smallest piece worth a copy (m; 1024).
    threshold: of max / mean below which homes do (lambda; 1.3)."""

    rule: ClassVar[Rule] = "shares"
    BOUNDS = {"capacity": "above 0", "min_rows": "1 or more", "threshold": "above 0"}

    def __init__(self, *, capacity: float = 1.1, min_rows: int = 1024, threshold: float = 1.3) -> None:
        self.capacity, self.min_rows, self.threshold = capacity, min_rows, threshold

    def plan(self, loads: np.ndarray, homes: LayerPlacement, topology: Topology, costs: Costs, room: int) -> LayerPlan:
        loads_E = loads_by_expert(loads)
        native_P = np.zeros(homes.positions, dtype=np.int64)
        np.add.at(native_P, np.asarray(homes.home), loads_E)
        total = int(loads_E.sum())
        if int(native_P.max()) * homes.positions < self.threshold * total or total == 0:
            assignments = [(expert, at, int(rows)) for expert, (at, rows) in enumerate(zip(homes.home, loads_E, strict=True))]
        else:
            room = copies_per_position(room, topology, costs, len(loads_E))
            assignments = spill(loads_E, homes, self.capacity, self.min_rows, room)
        placement = LayerPlacement(homes.home, homes.positions, tuple(
            {(expert, at) for expert, at, _ in assignments if at != homes.home[expert]}))
        rows_of: dict[tuple[int, int], int] = {}
        for expert, at, rows in assignments:
            rows_of[expert, at] = rows_of.get((expert, at), 0) + rows
        return LayerPlan(placement, tuple(rows_of.get((expert, at), 0) for expert, at, _ in placement.replicas))


@dataclass
class _Loads:
    """Loads while pieces are given out. free: copies each position can still take; copied: (expert, position) so far."""

    effective: list[int]
    free: list[int]
    copied: set[tuple[int, int]]

    def helpers(self, expert: int, home: int) -> list[int]:
        """Positions that can hold the expert, least loaded first."""
        candidates = [at for at in range(len(self.effective))
                if at != home and (self.free[at] or (expert, at) in self.copied)]
        return sorted(candidates, key=self.effective.__getitem__)

    def assign(self, expert: int, at: int, rows: int, home: int) -> tuple[int, int, int]:
        self.effective[at] += rows
        if at != home and (expert, at) not in self.copied:
            self.copied.add((expert, at))
            self.free[at] -= 1
        return expert, at, rows


def spill(loads_E: np.ndarray, homes: LayerPlacement, capacity: float, min_rows: int,
          room: int) -> list[tuple[int, int, int]]:
    """Pieces (expert, position, rows), in the order in which they are cut."""
    mean = int(loads_E.sum()) // homes.positions
    limit = max(1, int(capacity * mean) if mean else int(loads_E.sum()))
    loads = _Loads([0] * homes.positions, [room] * homes.positions, set())
    for expert, home in enumerate(homes.home):
        loads.effective[home] += int(loads_E[expert])
    assignments = []
    for expert in hottest_first(loads_E).tolist():
        home, rows = homes.home[expert], int(loads_E[expert])
        loads.effective[home] -= rows
        own = min(rows, max(0, limit - loads.effective[home]))
        if own:
            assignments.append(loads.assign(expert, home, own, home))
        assignments += _spill_rest(loads, expert, home, rows - own, limit, min_rows, reconsider=own > 0)
    return assignments


def _spill_rest(loads: _Loads, expert: int, home: int, rest: int, limit: int, min_rows: int, *,
                reconsider: bool) -> list[tuple[int, int, int]]:
    """reconsider: positions are sorted anew after every piece; as published, only where the home took a part."""
    assignments = []
    order = helpers = loads.helpers(expert, home) if rest else []
    while rest and (found := _next(loads, order, rest, limit, min_rows)):
        at, rows = found
        assignments.append(loads.assign(expert, at, rows, home))
        rest -= rows
        if reconsider:
            order = helpers = loads.helpers(expert, home)
        else:
            order = order[order.index(at) + 1:]
    if rest:
        assignments.append(loads.assign(expert, helpers[0] if helpers else home, rest, home))
    return assignments


def _next(loads: _Loads, order: list[int], rest: int, limit: int, min_rows: int) -> tuple[int, int] | None:
    """The first position with capacity for a piece that is large enough, or for all that is left."""
    for at in order:
        rows = min(rest, limit - loads.effective[at])
        if rows > 0 and (rows >= min_rows or rows == rest):
            return at, rows
    return None
