"""LAER-MoE's planner (FSEP): two ways to count replicas, one greedy placement, the better by its own time model.

Rules from `PKU-DAIR/Hetu-Galvatron`, branch laer-moe, csrc/greedy_balancer.cpp.

    counts   even: the same for all, where slots divide; and by queue: the largest load per replica gets one more, or one
             more on every node once it has as many as there are nodes (everyone starts with one per node if slots allow)
    place    replicas by load, descending, each to the least loaded position of the nodes with the fewest replicas of its
             expert, else to the least loaded that has a slot
    choose   the counts with the least 4 * (sum of all row traffic) + 3 * (largest computing)

Published without homes, every position's slots filled anew. A plan has homes: they are placed before the greedy starts, and
a position holds an expert once. Rows are split as its router does: evenly over replicas on their node, else over all.
"""

import heapq
from typing import ClassVar

import numpy as np

from moetrain.plan.cost.machine import Costs, Topology
from moetrain.plan.placement import LayerPlacement
from moetrain.plan.planners.base import LayerPlan, Planner, Rule, copies_per_position, loads_by_node


class Laer(Planner):
    """Fills all room, always."""

    rule: ClassVar[Rule] = "local_first"

    def plan(self, loads: np.ndarray, homes: LayerPlacement, topology: Topology, costs: Costs, room: int) -> LayerPlan:
        per_position = copies_per_position(room, topology, costs, homes.num_experts)
        loads_NE = loads_by_node(loads, topology)
        slots_P = np.bincount(homes.home, minlength=homes.positions) + per_position       # homes in pieces take a slot as others do
        held_EP = best_replicas(loads_NE, slots_P, topology, costs, homes)
        copies = [(expert, at) for expert, at in np.argwhere(held_EP).tolist() if at != homes.home[expert]]
        return LayerPlan(LayerPlacement(homes.home, homes.positions, tuple(copies)))


def best_replicas(loads_NE: np.ndarray, slots_P: np.ndarray, topology: Topology, costs: Costs,
         homes: LayerPlacement | None = None) -> np.ndarray:
    """Replicas of each expert at each position, int64 [E, P]. homes: None as published."""
    loads_E, slots = loads_NE.sum(0), int(slots_P.sum())
    candidates = [np.full(len(loads_E), slots // len(loads_E))] if slots % len(loads_E) == 0 else []
    candidates.append(queued_counts(loads_E, slots, topology.nodes))
    placed = [place_replicas(counts_E, loads_E, slots_P, topology, homes) for counts_E in candidates]
    return min(placed, key=lambda held_EP: _seconds(held_EP, loads_NE, topology, costs))       # ties: the first


def queued_counts(loads_E: np.ndarray, slots: int, nodes: int) -> np.ndarray:
    """Replicas of each expert, int64 [E]."""
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
    """Replicas of each expert at each position, int64 [E, P]."""
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
    """Its own model: everybody's traffic in sum, the largest computing; a row that stays where it is costs nothing."""
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
