"""Hecate's planner (arXiv 2502.02581), Algorithms 1 and 2.

Copies (Algorithm 1). Consider the t experts with the largest load, t being the number that other work hides.
If a position has room for all of them, all go everywhere. Otherwise the P * m free places are shared out in
proportion to load. The copies of each expert, the hottest first, are spread over nodes (those without it
before others, then those with more free places), and then over the positions of a node. The paper leaves the
rounding open. Here the next place always goes to the largest load per replica, ties to the lowest id, which
makes the largest load per replica as small as it can be.

Homes (Algorithm 2). All positions own equally many experts over all layers together; those of one layer may
be spread unevenly. Layers are visited by their heaviest expert that cannot be copied, descending. In a layer
such experts are visited by load, and each goes to the least loaded node and there to the least loaded
position (ties: fewer free slots). Experts that can be copied fill the slots that are left.

Shapes: E experts, P positions, N nodes.
"""

import heapq
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from moetrain.plan.cost.machine import Costs, Topology
from moetrain.plan.placement import ExpertPlacement, LayerPlacement
from moetrain.plan.planners.base import (
    LayerPlan,
    Planner,
    Rule,
    copies_per_position,
    hottest_first,
    loads_by_expert,
    max_hidden_copies,
)


class Hecate(Planner):
    """Planner with copies and homes as published."""

    rule: ClassVar[Rule] = "local_first"

    def plan(self, loads: np.ndarray, homes: LayerPlacement, topology: Topology, costs: Costs,
             max_copies: int) -> LayerPlan:
        """Algorithm 1: copies of the hottest experts."""
        loads_E = loads_by_expert(loads)
        most = copies_per_position(max_copies, topology, costs, len(loads_E))
        hot = hottest_first(loads_E)[:max_hidden_copies(topology, costs, len(loads_E))].tolist()
        if len(hot) <= most:
            everywhere = [(expert, at) for expert in hot for at in range(homes.positions)
                          if at != homes.home[expert]]
            return LayerPlan(LayerPlacement(homes.home, homes.positions, tuple(everywhere)))
        counts = replica_counts(loads_E, hot, homes.positions * most, homes.positions)
        free_P = np.full(homes.positions, most, dtype=np.int64)
        copies = [copy for expert in hot
                  for copy in _place_copies(expert, counts[expert] - 1, homes, topology, free_P)]
        return LayerPlan(LayerPlacement(homes.home, homes.positions, tuple(copies)))

    def rehome(self, loads: Mapping[str, np.ndarray], placement: ExpertPlacement, topology: Topology,
               costs: Mapping[str, Costs]) -> ExpertPlacement:
        """Algorithm 2: homes that balance the experts that cannot be copied."""
        loads_E = {name: loads_by_expert(loads[name]) for name, _ in placement.layers}
        hot = {}
        for name, layer in placement.layers:
            hidden = max_hidden_copies(topology, costs[name], layer.num_experts)
            hot[name] = set(hottest_first(loads_E[name])[:hidden].tolist())
        free_homes = _FreeHomes(sum(layer.num_experts for _, layer in placement.layers), topology)
        homes = {name: np.zeros(layer.num_experts, dtype=np.int64) for name, layer in placement.layers}
        for name in sorted(homes, key=lambda name: -_heaviest(loads_E[name], hot[name])):
            load_P = np.zeros(topology.positions, dtype=np.int64)
            for expert in hottest_first(loads_E[name]).tolist():
                if expert not in hot[name]:
                    at = free_homes.take(load_P)
                    homes[name][expert] = at
                    load_P[at] += loads_E[name][expert]
        for name in homes:
            for expert in sorted(hot[name]):
                homes[name][expert] = free_homes.take_any()
        return ExpertPlacement(tuple((name, LayerPlacement(tuple(homes[name].tolist()), topology.positions))
                                     for name, _ in placement.layers))


def replica_counts(loads_E: np.ndarray, experts: list[int], places: int, max_replicas: int) -> dict[int, int]:
    """Share out places for copies, each to the expert with the largest load per replica.

    Args:
        loads_E: rows of each expert, int64 [E].
        experts: experts that may be copied; each has one replica, its home.
        places: replicas to add.
        max_replicas: replicas that an expert may have.

    Returns:
        Replicas of each of these experts, homes included.
    """
    counts = dict.fromkeys(experts, 1)
    queue = [(-int(loads_E[expert]) / 1, expert) for expert in experts if max_replicas > 1]
    heapq.heapify(queue)
    while places and queue:
        _, expert = heapq.heappop(queue)
        counts[expert] += 1
        places -= 1
        if counts[expert] < max_replicas:
            heapq.heappush(queue, (-int(loads_E[expert]) / counts[expert], expert))
    return counts


def _place_copies(expert: int, count: int, homes: LayerPlacement, topology: Topology,
                  free_P: np.ndarray) -> list[tuple[int, int]]:
    """Place copies of an expert, and take their places from free_P.

    Returns:
        Expert and position of each copy: `count`, or fewer where no position can hold another.
    """
    node_P = np.arange(homes.positions) // topology.per_node
    holds_P = np.zeros(homes.positions, dtype=bool)
    holds_P[homes.home[expert]] = True
    copies = []
    for _ in range(count):
        candidate_P = (free_P > 0) & ~holds_P
        if not candidate_P.any():
            break
        has_N = np.bincount(node_P, weights=holds_P, minlength=topology.nodes) > 0
        free_N = np.bincount(node_P, weights=free_P, minlength=topology.nodes).astype(np.int64)
        candidate_nodes = np.flatnonzero(np.bincount(node_P, weights=candidate_P, minlength=topology.nodes))
        node = min(candidate_nodes.tolist(), key=lambda node: (has_N[node], -free_N[node], node))
        at = min((at for at in topology.positions_of(node) if candidate_P[at]),
                 key=lambda at: (-free_P[at], at))
        holds_P[at] = True
        free_P[at] -= 1
        copies.append((expert, at))
    return copies


def _heaviest(loads_E: np.ndarray, hot: set[int]) -> int:
    """Largest load of an expert that is not hot; -1 if all are."""
    return max((int(load) for expert, load in enumerate(loads_E) if expert not in hot), default=-1)


class _FreeHomes:
    """Homes that positions can still take, over all layers together.

    All positions take equally many; the first ones take one more where the number does not divide evenly.
    """

    def __init__(self, experts: int, topology: Topology) -> None:
        each, more = divmod(experts, topology.positions)
        self.free_P = np.full(topology.positions, each, dtype=np.int64)
        self.free_P[:more] += 1
        self.topology = topology

    def take(self, load_P: np.ndarray) -> int:
        """Take a home on the least loaded node, at its least loaded position, and return the position.

        Ties go to the node or position with fewer free homes, then to the lowest id.
        """
        node_P = np.arange(len(load_P)) // self.topology.per_node
        load_N = np.bincount(node_P, weights=load_P, minlength=self.topology.nodes)
        free_N = np.bincount(node_P, weights=self.free_P, minlength=self.topology.nodes)
        node = min(np.flatnonzero(free_N).tolist(), key=lambda node: (load_N[node], free_N[node], node))
        at = min((at for at in self.topology.positions_of(node) if self.free_P[at]),
                 key=lambda at: (load_P[at], self.free_P[at], at))
        self.free_P[at] -= 1
        return at

    def take_any(self) -> int:
        """Take a home at the first position that has one left."""
        at = int(np.flatnonzero(self.free_P)[0])
        self.free_P[at] -= 1
        return at
