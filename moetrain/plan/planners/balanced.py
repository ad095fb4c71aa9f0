"""moetrain's own planner: the fewest copies that level the loads, as far as leveling pays.

The planner tries a handful of levels between the mean load and the largest. Rows above a level move from the
full positions into those below it (plan/leveling/overflow.py), divided to measure or whole where they fit. At
the best level it tries once more with copies first on the nodes that rows come from. To the best of these it
adds copies that keep rows on their node: as many as are hidden, twice that, or as many as there is room for
(plan/leveling/locality.py). Every such plan is timed by the model of plan/cost/step_time.py, in which copies
cost nothing while they are hidden, and the time of their links beyond that. The shortest is taken. Its rows
are then split by `waterfill`.

Nothing is done where little is to be gained: below an imbalance of 1 + `tolerance`, or where the model
promises less than `min_gain` of the step.

Homes are chosen by plan/leveling/rehoming.py. Experts are sliced where that is modeled to pay: copies of
sliced experts are sent by all positions instead of one, and the model counts with it, here and when copies
are planned.

Shapes: E experts, P positions, N nodes, X copies, C replicas (homes, then copies).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import numpy as np

from moetrain.plan.cost.link_traffic import LinkLoad, copy_traffic
from moetrain.plan.cost.machine import Costs, Topology
from moetrain.plan.cost.step_time import StepTime, step_time_from_loads
from moetrain.plan.leveling.locality import NodeFlows, add_local_copies
from moetrain.plan.leveling.overflow import LoadSnapshot, OverflowPlan, OverflowState, sum_by_index
from moetrain.plan.leveling.rehoming import exchange_homes
from moetrain.plan.placement import ExpertPlacement, LayerPlacement
from moetrain.plan.planners.base import (
    LayerPlan,
    Planner,
    Rule,
    copies_per_position,
    hottest_first,
    loads_by_expert,
    loads_by_node,
    max_hidden_copies,
)

# Levels tried, in 1/64 of the way from the mean to the largest load.
LEVELS = (0, 3, 12)


class Balanced(Planner):
    """Planner that adds copies while the modeled step becomes shorter.

    Args:
        tolerance: excess of the largest position load over the mean, as a fraction, that is left alone.
        min_gain: share of the modeled time that copies must save.
        horizon: steps for which homes are expected to stay.
        state_ratio: bytes of an expert's state (parameter and two moments) over those of its matrices as they
            are sent: 3 in float32, 6 in bfloat16.
    """

    rule: ClassVar[Rule] = "waterfill"
    BOUNDS = {"tolerance": "0 or more", "min_gain": "0 or more", "horizon": "1 or more",
              "state_ratio": "above 0"}

    def __init__(self, *, tolerance: float = 0.05, min_gain: float = 0.01, horizon: int = 100,
                 state_ratio: float = 3.0) -> None:
        self.tolerance, self.min_gain = tolerance, min_gain
        self.horizon, self.state_ratio = horizon, state_ratio

    def plan(self, loads: np.ndarray, homes: LayerPlacement, topology: Topology, costs: Costs,
             max_copies: int) -> LayerPlan:
        overflow, _ = self._plan_and_time(loads, homes, topology, costs, max_copies)
        return LayerPlan(LayerPlacement(homes.home, homes.positions, tuple(
            zip(overflow.expert_X.tolist(), overflow.position_X.tolist(), strict=True))))

    def _plan_and_time(self, loads: np.ndarray, homes: LayerPlacement, topology: Topology, costs: Costs,
                       max_copies: int) -> tuple[OverflowPlan, float]:
        """Plan the copies of a layer; also return the modeled seconds of the plan."""
        if topology.nodes == 1:
            # There is one kind of link. Every position counts as a node, and rows are best kept at their
            # position.
            topology, costs = Topology(topology.positions, 1), replace(costs, between=costs.inside)
            loads = loads_by_expert(loads)
        loads_NE, home_E = loads_by_node(loads, topology), np.asarray(homes.home)
        snapshot = LoadSnapshot(loads_NE, home_E, topology, homes.sliced)
        total, highest = int(snapshot.loads_E.sum()), int(snapshot.load_P.max())
        no_copies = OverflowPlan.empty(snapshot.loads_E)
        no_copies_s = estimate(no_copies, snapshot, costs).total_s
        if highest * topology.positions <= (1 + self.tolerance) * total or max_copies == 0:
            return no_copies, no_copies_s
        best, least_s = self._search(snapshot, costs, max_copies, -(-total // topology.positions), highest)
        return (best, least_s) if least_s < (1 - self.min_gain) * no_copies_s else (no_copies, no_copies_s)

    @staticmethod
    def _search(snapshot: LoadSnapshot, costs: Costs, max_copies: int, mean: int,
                highest: int) -> tuple[OverflowPlan, float]:
        """Find the plan with the least modeled time, and return both.

        A tie goes to the first that was tried.
        """
        tried: list[tuple[float, int, OverflowState]] = []

        def consider(state: OverflowState) -> None:
            tried.append((estimate(state.result(), snapshot, costs).total_s, len(tried), state))

        for step in LEVELS:
            for whole in (False, True):
                level = mean + (highest - mean) * step // 64
                consider(OverflowState(snapshot, level, max_copies).place_overflow(whole=whole))
        best_level = min(tried)[2].level
        consider(OverflowState(snapshot, best_level, max_copies).place_overflow(
            on_source_nodes=True, whole=False))
        base, flows = min(tried)[2], NodeFlows(snapshot, max_copies)
        hidden = max_hidden_copies(snapshot.topology, costs, len(snapshot.home_E))
        for budget in sorted({max(1, hidden), max(1, 2 * hidden), len(snapshot.load_P) * max_copies}):
            consider(add_local_copies(base, flows, budget))
        least_s, _, state = min(tried)
        return state.result(), least_s

    def rehome(self, loads: Mapping[str, np.ndarray], placement: ExpertPlacement, topology: Topology,
               costs: Mapping[str, Costs]) -> ExpertPlacement:
        """Exchange homes where that pays over the horizon.

        Layers are timed with as many copies as are hidden, but with no more than a position has homes,
        whatever its memory: homes should be good without copies that might not fit or might be late.
        """
        by_router = {name: loads_by_expert(loads[name]) for name, _ in placement.layers}

        def seconds(name: str, homes: LayerPlacement) -> float:
            homes_each = -(-homes.num_experts // homes.positions)
            max_copies = copies_per_position(homes_each, topology, costs[name], homes.num_experts)
            return self._plan_and_time(by_router[name], homes, topology, costs[name], max_copies)[1]

        move_s = {name: self._move_s(topology, each) for name, each in costs.items()}
        return exchange_homes(by_router, placement, seconds, horizon=self.horizon, tolerance=self.tolerance,
                              move_s=move_s)

    def _move_s(self, topology: Topology, costs: Costs) -> float:
        """Seconds to move one expert of a layer with its moments."""
        rate = costs.between if topology.nodes > 1 else costs.inside
        return costs.expert_bytes * self.state_ratio / rate

    def choose_sliced(self, loads_E: np.ndarray, homes: LayerPlacement, topology: Topology, costs: Costs,
                      max_copies: int, most: int) -> tuple[int, ...]:
        """Slice no expert, the 1, 2, 4, ... hottest, or those that are sliced now.

        The choice is the shortest over the horizon, with the time to slice experts and to put them together
        again.
        """
        rate = costs.between if topology.nodes > 1 else costs.inside
        hottest, now = hottest_first(loads_E)[:most].tolist(), homes.sliced[:most]

        def seconds(sliced: tuple[int, ...]) -> float:
            changed = len(set(sliced) ^ set(now))
            step_s = self._plan_and_time(loads_E, homes.with_sliced(sliced), topology, costs, max_copies)[1]
            return self.horizon * step_s + changed * costs.expert_bytes * self.state_ratio / rate

        sizes = {min(2**power, most) for power in range(most.bit_length() + 1)}
        return min([now, (), *(tuple(sorted(hottest[:size])) for size in sorted(sizes))], key=seconds)


def estimate(overflow: OverflowPlan, snapshot: LoadSnapshot, costs: Costs) -> StepTime:
    """Modeled time of a plan before the sources of rows are known (plan/cost/step_time.py).

    The rows of a node count as spread evenly over its positions, and as going to replicas on the node first.

    Args:
        overflow: copies and their rows.
        snapshot: loads and homes of the layer.
        costs: what a row, an expert and a link cost.
    """
    loads_NE, home_E, topology = snapshot.loads_NE, snapshot.home_E, snapshot.topology
    experts, nodes, per_node = len(home_E), topology.nodes, topology.per_node
    expert_C = np.concatenate([np.arange(experts), overflow.expert_X])
    position_C = np.concatenate([home_E, overflow.position_X])
    rows_C = np.concatenate([overflow.kept_E, overflow.rows_X])
    load_P = sum_by_index(position_C, rows_C, topology.positions)
    size_N = np.bincount(np.arange(topology.positions) // per_node, minlength=nodes)

    cell_C = position_C // per_node * experts + expert_C                 # (node, expert) of each replica
    supply_C = sum_by_index(cell_C, rows_C, nodes * experts)[cell_C]
    local_C = np.minimum(loads_NE.reshape(-1)[cell_C], supply_C) * rows_C // np.maximum(supply_C, 1)
    local_P = sum_by_index(position_C, local_C, topology.positions)
    local_N = np.add.reduceat(local_P, np.arange(nodes) * per_node)
    inside = max(int((local_P * (size_N - 1).repeat(size_N) // size_N.repeat(size_N)).max()),
                 int((local_N * (size_N - 1) // size_N**2).max()))
    between = max(int((load_P - local_P).max()), int(((loads_NE.sum(1) - local_N) // size_N).max()))

    copies = copy_traffic(overflow.expert_X, overflow.position_X, home_E, snapshot.sliced, topology,
                          costs.collective)
    return step_time_from_loads(int(load_P.max()), LinkLoad(inside, between), copies, costs)
