"""The step time of one layer, by a model: what planners minimise, what splits are chosen by, what reports print.

    compute   row_s * the largest position load
    link      four exchanges (dispatch and combine, forward and backward), each latency_s + row_bytes * the busiest link;
              a position has one link to its node and one to the others, each carrying both directions at once, so busy is
              the larger of what it sends and what it receives
    copy      weights to the copies, forward, and their gradients home, backward: each a latency a message and expert_bytes *
              the busiest link; only what outlasts hidden_s (twice that backward) counts, and all of what leaders pass on
              (plan/cost/link_traffic.py)
    total     their sum: nothing overlaps but copies and the work that hides them

A row that stays at its position crosses no link.
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
    """Seconds of one layer, forward and backward."""

    compute_s: float
    link_s: float
    copy_s: float
    total_s: float


class ByPosition(NamedTuple):
    """Replicas sorted by position: their order, where each position's begin, and the positions that have any."""

    order: np.ndarray
    start: np.ndarray
    present: np.ndarray


def step_time(split_PC: np.ndarray | Tensor, placement: LayerPlacement, topology: Topology, costs: Costs) -> StepTime:
    """The model above for rows [sources, replicas] of all sources (plan/splitting/split.py), on the host."""
    return step_times(np.asarray(split_PC)[None], placement, topology, costs)[0]


def step_times(split_KPC: np.ndarray, placement: LayerPlacement, topology: Topology, costs: Costs) -> list[StepTime]:
    """The same for K splits over the same replicas."""
    by_position, copies = _layout(placement, topology, costs.collective)
    to_KPP = np.zeros((*split_KPC.shape[:2], topology.positions), dtype=np.int64)
    to_KPP[..., by_position.present] = np.add.reduceat(split_KPC[..., by_position.order], by_position.start, axis=2)
    loads = to_KPP.sum(1).max(1).tolist()
    return [step_time_from_loads(load, rows, copies, costs) for load, rows in zip(loads, _crossings(to_KPP, topology), strict=True)]


def step_time_from_loads(load: int, rows: LinkLoad, copies: CopyTraffic, costs: Costs) -> StepTime:
    """load: rows of the fullest position. rows: how many cross the busiest links."""
    compute_s = costs.row_s * load
    link_s = EXCHANGES * (costs.latency_s + rows.seconds(costs.row_bytes, costs))
    first_s, second_s = _stage_seconds(copies, costs)
    copy_s = max(0.0, first_s - costs.hidden_s) + max(0.0, first_s - 2 * costs.hidden_s) + 2 * second_s
    return StepTime(compute_s, link_s, copy_s, compute_s + link_s + copy_s)


def gather_seconds(placement: LayerPlacement, topology: Topology, costs: Costs) -> float:
    """Bringing a placement's copies once, hidden or not; their gradients take as long."""
    return sum(_stage_seconds(_layout(placement, topology, costs.collective)[1], costs))


def _stage_seconds(copies: CopyTraffic, costs: Costs) -> tuple[float, float]:
    """What leaves first, and what leaders pass on."""
    return (copies.messages * costs.latency_s + copies.first.seconds(costs.expert_bytes, costs),
            costs.latency_s + copies.second.seconds(costs.expert_bytes, costs) if any(copies.second) else 0.0)


@lru_cache(maxsize=256)
def _layout(placement: LayerPlacement, topology: Topology, collective: str) -> tuple[ByPosition, CopyTraffic]:
    """Where a placement's replicas are, and what its copies put on links."""
    position_C = np.array([position for _, position, _ in placement.replicas])
    order = np.argsort(position_C, kind="stable")
    present, start = np.unique(position_C[order], return_index=True)
    expert_X, position_X = np.array(placement.copies, dtype=np.int64).reshape(-1, 2).T
    return ByPosition(order, start, present), copy_traffic(expert_X, position_X, np.array(placement.home), placement.sliced,
                                                     topology, collective)


def _crossings(to_KPP: np.ndarray, topology: Topology) -> list[LinkLoad]:
    """to_KPP: what each position sends to each, K times."""
    busiest = [np.maximum(flow_KPP.sum(1), flow_KPP.sum(2)).max(1).tolist()
               for flow_KPP in (to_KPP * links_PP for links_PP in _links(topology))]
    return [LinkLoad(inside, between) for inside, between in zip(*busiest, strict=True)]


@lru_cache(maxsize=64)
def _links(topology: Topology) -> tuple[np.ndarray, np.ndarray]:
    """Which pairs of positions [P, P] are on one node, and which are not; nobody sends to itself."""
    node_P = np.arange(topology.positions) // topology.per_node
    same_node_PP = node_P[:, None] == node_P
    return same_node_PP & ~np.eye(topology.positions, dtype=bool), ~same_node_PP
