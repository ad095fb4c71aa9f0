"""Modeled step time of one layer: what planners minimize, what splits are chosen by, what reports print.

    compute   row_s * the largest position load
    link      four exchanges (dispatch and combine, forward and backward), each latency_s + row_bytes * the
              busiest link. A position has one link to its node and one to the other nodes, and each carries
              both directions at once. So the load of a link is the larger of what its position sends and
              what it receives
    copy      matrices to the copies in forward, and their gradients home in backward: each a latency for
              every message and expert_bytes * the busiest link. Only what outlasts hidden_s (twice that in
              backward) counts, and all of what leaders pass on (plan/cost/link_traffic.py)
    total     their sum: nothing overlaps but copies and the work that hides them

A row that stays at its position crosses no link.

Shapes: P positions (as sources and as destinations), C replicas, K splits.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from torch import Tensor

from moetrain.plan.cost.link_traffic import CopyTraffic, LinkLoad, copy_traffic
from moetrain.plan.cost.machine import Costs, Topology
from moetrain.plan.placement import LayerPlacement

EXCHANGES = 4


class StepTime(NamedTuple):
    """Seconds of one layer in a step, forward and backward together."""

    compute_s: float
    link_s: float
    copy_s: float
    total_s: float


class ByPosition(NamedTuple):
    """Replicas sorted by position, int64.

    Attributes:
        order: indices of the replicas in that order.
        start: where the replicas of each position in `present` begin.
        present: positions that have any replica, ascending.
    """

    order: np.ndarray
    start: np.ndarray
    present: np.ndarray


def step_time(split_PC: np.ndarray | Tensor, placement: LayerPlacement, topology: Topology,
              costs: Costs) -> StepTime:
    """Modeled time of a layer whose rows are split so.

    Args:
        split_PC: int64 [P, C], rows of each source for each replica (plan/splitting/split.py), on the host.
        placement: homes and copies, in whose order the replicas are.
        topology: positions and nodes.
        costs: what a row, an expert and a link cost.
    """
    return step_times(np.asarray(split_PC)[None], placement, topology, costs)[0]


def step_times(split_KPC: np.ndarray, placement: LayerPlacement, topology: Topology,
               costs: Costs) -> list[StepTime]:
    """Modeled times of K splits over the same replicas.

    Args:
        split_KPC: int64 [K, P, C], rows of each source for each replica.
        placement: homes and copies, in whose order the replicas are.
        topology: positions and nodes.
        costs: what a row, an expert and a link cost.
    """
    by_position, copies = _layout(placement, topology, costs.collective)
    to_KPP = np.zeros((*split_KPC.shape[:2], topology.positions), dtype=np.int64)
    sorted_KPC = split_KPC[..., by_position.order]
    to_KPP[..., by_position.present] = np.add.reduceat(sorted_KPC, by_position.start, axis=2)
    loads = to_KPP.sum(1).max(1).tolist()
    return [step_time_from_loads(load, rows, copies, costs)
            for load, rows in zip(loads, _row_traffic(to_KPP, topology), strict=True)]


def step_time_from_loads(load: int, rows: LinkLoad, copies: CopyTraffic, costs: Costs) -> StepTime:
    """Modeled time of a layer whose busiest position and links carry so much.

    Args:
        load: rows of the fullest position.
        rows: rows on the busiest links, in one exchange.
        copies: experts on the busiest links, in one gather of the copies.
        costs: what a row, an expert and a link cost.
    """
    compute_s = costs.row_s * load
    link_s = EXCHANGES * (costs.latency_s + rows.seconds(costs.row_bytes, costs))
    first_s, second_s = _stage_seconds(copies, costs)
    copy_s = max(0.0, first_s - costs.hidden_s) + max(0.0, first_s - 2 * costs.hidden_s) + 2 * second_s
    return StepTime(compute_s, link_s, copy_s, compute_s + link_s + copy_s)


def gather_seconds(placement: LayerPlacement, topology: Topology, costs: Costs) -> float:
    """Time to bring a placement's copies once, hidden or not. Reducing their gradients takes as long."""
    return sum(_stage_seconds(_layout(placement, topology, costs.collective)[1], costs))


def _stage_seconds(copies: CopyTraffic, costs: Costs) -> tuple[float, float]:
    """Seconds of what is sent at the start of the block, and of what leaders pass on."""
    return (copies.messages * costs.latency_s + copies.first.seconds(costs.expert_bytes, costs),
            costs.latency_s + copies.second.seconds(costs.expert_bytes, costs) if any(copies.second) else 0.0)


@lru_cache(maxsize=256)
def _layout(placement: LayerPlacement, topology: Topology, collective: str) -> tuple[ByPosition, CopyTraffic]:
    """Where a placement's replicas are, and the load of its copies on links.

    Kept: a plan is timed many times.
    """
    position_C = np.array([position for _, position, _ in placement.replicas])
    order = np.argsort(position_C, kind="stable")
    present, start = np.unique(position_C[order], return_index=True)
    expert_X, position_X = np.array(placement.copies, dtype=np.int64).reshape(-1, 2).T
    home_E = np.array(placement.home)
    traffic = copy_traffic(expert_X, position_X, home_E, placement.sliced, topology, collective)
    return ByPosition(order, start, present), traffic


def _row_traffic(to_KPP: np.ndarray, topology: Topology) -> list[LinkLoad]:
    """Loads of the busiest links, for each of K tables of what each position sends to each."""
    busiest = [np.maximum(flow_KPP.sum(1), flow_KPP.sum(2)).max(1).tolist()
               for flow_KPP in (to_KPP * links_PP for links_PP in _links(topology))]
    return [LinkLoad(inside, between) for inside, between in zip(*busiest, strict=True)]


@lru_cache(maxsize=64)
def _links(topology: Topology) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of positions on one node, and on two: bool [P, P] each. No position sends to itself."""
    node_P = np.arange(topology.positions) // topology.per_node
    same_node_PP = node_P[:, None] == node_P
    return same_node_PP & ~np.eye(topology.positions, dtype=bool), ~same_node_PP
