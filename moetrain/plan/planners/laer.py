"""LAER-MoE's planner (FSEP): two ways to count replicas, one greedy placement, the better of the two results.

Rules from `PKU-DAIR/Hetu-Galvatron`, branch laer-moe, csrc/greedy_balancer.cpp.

    counts   even: the same for all experts, where that divides the slots; and by queue: the largest load per
             replica gets one more, or one more on every node once it has as many replicas as there are nodes
             (every expert starts with one on each node if the slots allow)
    place    replicas by load, descending, each to the least loaded position of the nodes with the fewest
             replicas of its expert; if none of these has a free slot, to the least loaded position with one
    choose   the counts with the least 4 * (sum of all row traffic) + 3 * (largest computing)

Published without homes: the slots of every position are filled anew. A plan has homes, so they are placed
before the greedy placement starts, and a position holds an expert once. Rows are split as LAER's router does:
evenly over replicas on their node, otherwise over all replicas.

Shapes: E experts, P positions, N nodes.
"""

import heapq
from typing import ClassVar

import numpy as np

from moetrain.plan.cost.machine import Costs, Topology
from moetrain.plan.placement import LayerPlacement
from moetrain.plan.planners.base import LayerPlan, Planner, Rule, copies_per_position, loads_by_node


class Laer(Planner):
    """Planner that always fills all places for copies."""

    rule: ClassVar[Rule] = "local_first"

    def plan(self, loads: np.ndarray, homes: LayerPlacement, topology: Topology, costs: Costs,
             max_copies: int) -> LayerPlan:
        most = copies_per_position(max_copies, topology, costs, homes.num_experts)
        loads_NE = loads_by_node(loads, topology)
        # Homes of sliced experts take a slot as others do.
        slots_P = np.bincount(homes.home, minlength=homes.positions) + most
        held_EP = best_replicas(loads_NE, slots_P, topology, costs, homes)
        copies = [(expert, at) for expert, at in np.argwhere(held_EP).tolist() if at != homes.home[expert]]
        return LayerPlan(LayerPlacement(homes.home, homes.positions, tuple(copies)))


def best_replicas(loads_NE: np.ndarray, slots_P: np.ndarray, topology: Topology, costs: Costs,
                  homes: LayerPlacement | None = None) -> np.ndarray:
    """Choose the better of even and queued replica counts, placed greedily; even counts win a tie.

    Args:
        loads_NE: rows of each expert from each node, int64 [N, E].
        slots_P: physical slots of each position, int64 [P].
        topology: positions and nodes.
        costs: what a row and a link cost.
        homes: homes that are placed first; None places all replicas, as published.

    Returns:
        Replicas of each expert at each position, int64 [E, P].
    """
    loads_E, slots = loads_NE.sum(0), int(slots_P.sum())
    candidates = [np.full(len(loads_E), slots // len(loads_E))] if slots % len(loads_E) == 0 else []
    candidates.append(queued_counts(loads_E, slots, topology.nodes))
    placed = [place_replicas(counts_E, loads_E, slots_P, topology, homes) for counts_E in candidates]
    return min(placed, key=lambda held_EP: _seconds(held_EP, loads_NE, topology, costs))


def queued_counts(loads_E: np.ndarray, slots: int, nodes: int) -> np.ndarray:
    """Count replicas by a queue of the largest load per replica.

    Args:
        loads_E: rows of each expert, int64 [E].
        slots: physical slots of all positions together.
        nodes: number of nodes.

    Returns:
        Replicas of each expert, int64 [E].
    """
    start = nodes if nodes * len(loads_E) <= slots else 1
    counts_E = np.full(len(loads_E), start, dtype=np.int64)
    left = slots - start * len(loads_E)
    queue = [(-int(load) / start, expert) for expert, load in enumerate(loads_E)]
    heapq.heapify(queue)
    while left and queue:
        _, expert = heapq.heappop(queue)
        step = nodes if counts_E[expert] >= nodes else 1
        if step <= left:
            counts_E[expert] += step
            left -= step
            heapq.heappush(queue, (-int(loads_E[expert]) / int(counts_E[expert]), expert))
    return counts_E


def place_replicas(counts_E: np.ndarray, loads_E: np.ndarray, slots_P: np.ndarray, topology: Topology,
                   homes: LayerPlacement | None) -> np.ndarray:
    """Place replicas greedily, by load per replica, descending.

    Args:
        counts_E: replicas of each expert, int64 [E].
        loads_E: rows of each expert, int64 [E].
        slots_P: physical slots of each position, int64 [P].
        topology: positions and nodes.
        homes: homes that are placed first; None places all replicas, as published.

    Returns:
        Replicas of each expert at each position, int64 [E, P].
    """
    positions = topology.positions
    node_P = np.arange(positions) // topology.per_node
    held_EP = np.zeros((len(loads_E), positions), dtype=np.int64)
    share_E = loads_E / counts_E
    left_E = counts_E.copy()
    if homes is not None:
        held_EP[np.arange(len(loads_E)), homes.home] = 1
        left_E -= 1
    free_P = slots_P - held_EP.sum(0)
    load_P = np.bincount(homes.home, weights=share_E, minlength=positions) if homes else np.zeros(positions)
    for expert in np.argsort(-share_E, kind="stable").tolist():
        for _ in range(int(left_E[expert])):
            candidate_P = (free_P > 0) if homes is None else (free_P > 0) & (held_EP[expert] == 0)
            if not candidate_P.any():
                break
            held_N = np.bincount(node_P, weights=held_EP[expert], minlength=topology.nodes)
            fewest_P = candidate_P & (held_N == held_N.min())[node_P]
            candidates = np.flatnonzero(fewest_P if fewest_P.any() else candidate_P)
            at = candidates[np.argmin(load_P[candidates])]
            held_EP[expert, at] += 1
            load_P[at] += share_E[expert]
            free_P[at] -= 1
    return held_EP


def _seconds(held_EP: np.ndarray, loads_NE: np.ndarray, topology: Topology, costs: Costs) -> float:
    """Seconds by LAER's own time model: the traffic of all nodes in sum, and the largest computing.

    A row that stays at its position costs nothing.
    """
    node_P = np.arange(topology.positions) // topology.per_node
    size_N = np.bincount(node_P, minlength=topology.nodes)
    sent_s, load_P = 0.0, np.zeros(topology.positions)
    for node in range(topology.nodes):
        on_node_P = node_P == node
        here_EP = held_EP * on_node_P
        chosen_EP = np.where(here_EP.any(1, keepdims=True), here_EP, held_EP)
        rows_EP = loads_NE[node][:, None] * chosen_EP / chosen_EP.sum(1, keepdims=True).clip(1)
        load_P += rows_EP.sum(0)
        inside = rows_EP[:, on_node_P].sum() * (1 - 1 / size_N[node])
        sent_s += (inside / costs.inside + rows_EP[:, ~on_node_P].sum() / costs.between) * costs.row_bytes
    return float(4 * sent_s + costs.row_s * load_P.max())
