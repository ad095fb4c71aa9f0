"""Least-loaded expert parallelism: rows that do not fit at home spill to the least loaded positions.

arXiv 2601.17111; rules from `SalesforceAIResearch/LeastLoadedEP`, llep/gpt_oss_llep.py. Experts are visited
by load, descending. The effective load of a position is what it was assigned plus the load of its own experts
still to come; its capacity is `capacity` times the mean load. The home takes the rows that fit. The rest goes
to whichever position has the smallest effective load, in assignments of no fewer than `min_rows` rows, unless
it is the last of the expert. What fits nowhere goes to the least loaded position of all. Below an imbalance
of `threshold` nothing is done. The rows of an expert are cut by their global offset, wherever they are.

Published without a limit on copies. Here a position that has no room left for another expert is not asked.

Shapes: E experts, P positions, C replicas.
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

Assignment = tuple[int, int, int]        # expert, position, rows


class LeastLoaded(Planner):
    """Planner that spills what is above a position's capacity to the least loaded positions.

    Args:
        capacity: rows that a position takes, in means; alpha in the paper, published with 1.0 to 1.1.
        min_rows: fewest rows that are worth a copy; m in the paper, published with 1024.
        threshold: largest position load over the mean below which there are no copies; lambda in the paper,
            published with 1.3.
    """

    rule: ClassVar[Rule] = "shares"
    BOUNDS = {"capacity": "above 0", "min_rows": "1 or more", "threshold": "above 0"}

    def __init__(self, *, capacity: float = 1.1, min_rows: int = 1024, threshold: float = 1.3) -> None:
        self.capacity, self.min_rows, self.threshold = capacity, min_rows, threshold

    def plan(self, loads: np.ndarray, homes: LayerPlacement, topology: Topology, costs: Costs,
             max_copies: int) -> LayerPlan:
        loads_E = loads_by_expert(loads)
        native_P = np.zeros(homes.positions, dtype=np.int64)
        np.add.at(native_P, np.asarray(homes.home), loads_E)
        total = int(loads_E.sum())
        if int(native_P.max()) * homes.positions < self.threshold * total or total == 0:
            at_home = enumerate(zip(homes.home, loads_E, strict=True))
            assignments = [(expert, at, int(rows)) for expert, (at, rows) in at_home]
        else:
            max_copies = copies_per_position(max_copies, topology, costs, len(loads_E))
            assignments = spill(loads_E, homes, self.capacity, self.min_rows, max_copies)
        placement = LayerPlacement(homes.home, homes.positions, tuple(
            {(expert, at) for expert, at, _ in assignments if at != homes.home[expert]}))
        rows_of: dict[tuple[int, int], int] = {}
        for expert, at, rows in assignments:
            rows_of[expert, at] = rows_of.get((expert, at), 0) + rows
        quotas_C = tuple(rows_of.get((expert, at), 0) for expert, at, _ in placement.replicas)
        return LayerPlan(placement, quotas_C)


@dataclass
class _PositionLoads:
    """Loads of the positions while rows are assigned.

    Args:
        effective: effective load of each position.
        free: copies that each position can still take.
        copied: (expert, position) of the copies so far.
    """

    effective: list[int]
    free: list[int]
    copied: set[tuple[int, int]]

    def helpers(self, expert: int, home: int) -> list[int]:
        """Positions besides its home that can hold the expert, the least loaded first."""
        candidates = [at for at in range(len(self.effective))
                      if at != home and (self.free[at] or (expert, at) in self.copied)]
        return sorted(candidates, key=self.effective.__getitem__)

    def assign(self, expert: int, at: int, rows: int, home: int) -> Assignment:
        """Assign rows of an expert to a position, as a copy unless that is its home."""
        self.effective[at] += rows
        if at != home and (expert, at) not in self.copied:
            self.copied.add((expert, at))
            self.free[at] -= 1
        return expert, at, rows


def spill(loads_E: np.ndarray, homes: LayerPlacement, capacity: float, min_rows: int,
          max_copies: int) -> list[Assignment]:
    """Assign the rows of all experts to positions.

    Args:
        loads_E: rows of each expert, int64 [E].
        homes: homes of the layer.
        capacity: rows that a position takes, in means.
        min_rows: fewest rows that are worth a copy.
        max_copies: copies that a position may take.

    Returns:
        Expert, position and rows of each assignment, in the order in which they are made.
    """
    mean = int(loads_E.sum()) // homes.positions
    limit = max(1, int(capacity * mean) if mean else int(loads_E.sum()))
    loads = _PositionLoads([0] * homes.positions, [max_copies] * homes.positions, set())
    for expert, home in enumerate(homes.home):
        loads.effective[home] += int(loads_E[expert])
    assignments = []
    for expert in hottest_first(loads_E).tolist():
        home, rows = homes.home[expert], int(loads_E[expert])
        loads.effective[home] -= rows
        own = min(rows, max(0, limit - loads.effective[home]))
        if own:
            assignments.append(loads.assign(expert, home, own, home))
        assignments += _spill_rest(loads, expert, home, rows - own, limit, min_rows, resort=own > 0)
    return assignments


def _spill_rest(loads: _PositionLoads, expert: int, home: int, rest: int, limit: int, min_rows: int, *,
                resort: bool) -> list[Assignment]:
    """Assign the rows that do not fit at home.

    With `resort` positions are sorted anew after every assignment. As published, that is so only where the
    home took a part.
    """
    assignments = []
    order = helpers = loads.helpers(expert, home) if rest else []
    while rest and (found := _next(loads, order, rest, limit, min_rows)):
        at, rows = found
        assignments.append(loads.assign(expert, at, rows, home))
        rest -= rows
        if resort:
            order = helpers = loads.helpers(expert, home)
        else:
            order = order[order.index(at) + 1:]
    if rest:
        assignments.append(loads.assign(expert, helpers[0] if helpers else home, rest, home))
    return assignments


def _next(loads: _PositionLoads, order: list[int], rest: int, limit: int,
          min_rows: int) -> tuple[int, int] | None:
    """First position with capacity for enough rows, or for all that are left; and the rows that it takes."""
    for at in order:
        rows = min(rest, limit - loads.effective[at])
        if rows > 0 and (rows >= min_rows or rows == rest):
            return at, rows
    return None
