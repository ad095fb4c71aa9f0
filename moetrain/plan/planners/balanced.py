"""moetrain's own planner: the fewest copies that level the loads as far as levelling pays.

For a handful of levels between the mean load and the largest, what lies above the level moves from the full positions
into those below it (plan/leveling/overflow.py): cut to measure, or whole where they fit; and at the best level once more with
copies on the nodes that the rows come from first. To the best of these come copies that keep rows on their node, as many as
hide, or twice that, or as there is room for (plan/leveling/locality.py). Every such plan is timed by the model of
plan/cost/step_time.py, in which copies cost nothing while they hide and their links' time beyond that, and the shortest is taken.
Rows are then split by `waterfill`.

Nothing is done where nothing is to be gained: below an imbalance of 1 + `tolerance`, or where the model promises less than
`min_gain` of the step.

Homes: plan/leveling/rehoming.py. They are cut up where that is modelled to pay: copies of experts in pieces are sent by all
positions, and the model knows it, here and when copies are planned.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import numpy as np

from moetrain.plan.cost.link_traffic import LinkLoad, copy_traffic
from moetrain.plan.cost.machine import Costs, Topology
from moetrain.plan.cost.step_time import Modelled, step_time
from moetrain.plan.leveling.locality import Flows, keep_near
from moetrain.plan.leveling.overflow import Field, OverflowPlan, Pool, sums
from moetrain.plan.leveling.rehoming import resettle
from moetrain.plan.placement import ExpertPlacement, LayerPlacement
from moetrain.plan.planners.base import (
    LayerPlan,
    Planner,
    Rule,
    by_node,
    copies_each,
    fits_behind,
    hottest_first,
    totals,
)

# Levels tried, in 1/64 of the way from the mean to the largest load.
LEVELS = (0, 3, 12)


class Balanced(Planner):
    """tolerance: largest position load over the mean, less one, that is left alone. min_gain: share of the modelled time
    that copies must save. horizon: steps for which homes are expected to stay; state_ratio: bytes of an expert's state
    (parameter and two moments) over those of its weights on the wire: 3 in float32, 6 in bfloat16."""

    rule: ClassVar[Rule] = "waterfill"
    BOUNDS = {"tolerance": "0 or more", "min_gain": "0 or more", "horizon": "1 or more", "state_ratio": "above 0"}

    def __init__(self, *, tolerance: float = 0.05, min_gain: float = 0.01, horizon: int = 100,
                 state_ratio: float = 3.0) -> None:
        self.tolerance, self.min_gain, self.horizon, self.state_ratio = tolerance, min_gain, horizon, state_ratio

    def plan(self, loads: np.ndarray, homes: LayerPlacement, topology: Topology, costs: Costs, room: int) -> LayerPlan:
        overflow, _ = self._timed(loads, homes, topology, costs, room)
        return LayerPlan(LayerPlacement(homes.home, homes.positions, tuple(
            zip(overflow.expert_X.tolist(), overflow.position_X.tolist(), strict=True))))

    def _timed(self, loads: np.ndarray, homes: LayerPlacement, topology: Topology, costs: Costs,
               room: int) -> tuple[OverflowPlan, float]:
        """The plan, and the time that the model gives it."""
        if topology.nodes == 1:        # one kind of link: every position is a node of its own, and rows are best kept there
            topology, costs, loads = Topology(topology.positions, 1), replace(costs, between=costs.inside), totals(loads)
        field = Field(by_node(loads, topology), np.asarray(homes.home), topology, homes.sliced)
        total, highest = int(field.loads_E.sum()), int(field.load_P.max())
        nothing = OverflowPlan.nothing(field.loads_E)
        nothing_s = estimate(nothing, field, costs).total_s
        if highest * topology.positions <= (1 + self.tolerance) * total or room == 0:
            return nothing, nothing_s
        best, least_s = self._search(field, costs, room, -(-total // topology.positions), highest)
        return (best, least_s) if least_s < (1 - self.min_gain) * nothing_s else (nothing, nothing_s)

    @staticmethod
    def _search(field: Field, costs: Costs, room: int, mean: int, highest: int) -> tuple[OverflowPlan, float]:
        """The shortest plan and its modelled time; ties go to the first tried."""
        tried: list[tuple[float, int, Pool]] = []

        def time(pool: Pool) -> None:
            tried.append((estimate(pool.result(), field, costs).total_s, len(tried), pool))

        for step in LEVELS:
            for whole in (False, True):
                time(Pool(field, mean + (highest - mean) * step // 64, room).pour(whole=whole))
        level = min(tried)[2].level
        time(Pool(field, level, room).pour(nearby=True, whole=False))
        base, flows, hidden = min(tried)[2], Flows(field, room), fits_behind(field.topology, costs, len(field.home_E))
        for budget in sorted({max(1, hidden), max(1, 2 * hidden), len(field.load_P) * room}):
            time(keep_near(base, flows, budget))
        least_s, _, pool = min(tried)
        return pool.result(), least_s

    def rehome(self, loads: Mapping[str, np.ndarray], placement: ExpertPlacement, topology: Topology,
               costs: Costs) -> ExpertPlacement:
        """Timed with as many copies as hide, but not more than a position has homes, whatever the memory: homes should be
        good without copies that might not fit or be late."""
        by_router = {name: totals(loads[name]) for name, _ in placement.layers}
        rate = costs.between if topology.nodes > 1 else costs.inside

        def seconds(name: str, homes: LayerPlacement) -> float:
            room = copies_each(-(-homes.num_experts // homes.positions), topology, costs, homes.num_experts)
            return self._timed(by_router[name], homes, topology, costs, room)[1]

        return resettle(by_router, placement, seconds, horizon=self.horizon, tolerance=self.tolerance,
                        move_s=costs.expert_bytes * self.state_ratio / rate)

    def cut_up(self, loads_E: np.ndarray, homes: LayerPlacement, topology: Topology, costs: Costs, room: int,
               most: int) -> tuple[int, ...]:
        """None, or the 1, 2, 4, ... hottest, or what is cut up now: whichever is the shortest over the horizon, with what
        cutting up and putting together costs."""
        rate = costs.between if topology.nodes > 1 else costs.inside
        hottest, now = hottest_first(loads_E)[:most].tolist(), homes.sliced[:most]

        def seconds(sliced: tuple[int, ...]) -> float:
            changed = len(set(sliced) ^ set(now))
            step_s = self._timed(loads_E, homes.with_sliced(sliced), topology, costs, room)[1]
            return self.horizon * step_s + changed * costs.expert_bytes * self.state_ratio / rate

        sizes = {min(2**power, most) for power in range(most.bit_length() + 1)}
        return min([now, (), *(tuple(sorted(hottest[:size])) for size in sorted(sizes))], key=seconds)


def estimate(overflow: OverflowPlan, field: Field, costs: Costs) -> Modelled:
    """The model of plan/cost/step_time.py before sources are known: a node's rows are spread evenly over its positions, and go
    to replicas on the node first."""
    loads_NE, home_E, topology = field.loads_NE, field.home_E, field.topology
    experts, nodes, per_node = len(home_E), topology.nodes, topology.per_node
    expert_C = np.concatenate([np.arange(experts), overflow.expert_X])
    position_C = np.concatenate([home_E, overflow.position_X])
    rows_C = np.concatenate([overflow.kept_E, overflow.rows_X])
    load_P = sums(position_C, rows_C, topology.positions)
    size_N = np.bincount(np.arange(topology.positions) // per_node, minlength=nodes)

    cell_C = position_C // per_node * experts + expert_C
    supply_C = sums(cell_C, rows_C, nodes * experts)[cell_C]
    local_C = np.minimum(loads_NE.reshape(-1)[cell_C], supply_C) * rows_C // np.maximum(supply_C, 1)
    local_P = sums(position_C, local_C, topology.positions)
    local_N = np.add.reduceat(local_P, np.arange(nodes) * per_node)
    inside = max(int((local_P * (size_N - 1).repeat(size_N) // size_N.repeat(size_N)).max()),
                 int((local_N * (size_N - 1) // size_N**2).max()))
    between = max(int((load_P - local_P).max()), int(((loads_NE.sum(1) - local_N) // size_N).max()))

    copies = copy_traffic(overflow.expert_X, overflow.position_X, home_E, field.sliced, topology, costs.collective)
    return step_time(int(load_P.max()), LinkLoad(inside, between), copies, costs)
