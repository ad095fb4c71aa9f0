"""Interface of the planners: loads and homes in, copies out.

A planner is a pure function of integers that all ranks share and of configured numbers: equal loads give
equal plans. It gets the same forecast, memory and bandwidth as every other. Two numbers follow from these for
all planners (Hecate, arXiv 2502.02581, section 3): `max_hidden_copies` and `copies_per_position` below.

Shapes: E experts, P positions, N nodes, C replicas.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

import numpy as np

from moetrain.plan.cost.machine import Costs, Topology
from moetrain.plan.placement import ExpertPlacement, LayerPlacement

Rule = Literal["local_first", "waterfill", "shares"]


@dataclass(frozen=True)
class LayerPlan:
    """Plan of one layer for a step.

    Args:
        placement: the given homes, and copies.
        quotas_C: rows for each replica, in the order of `placement.replicas`; only if the rule is `shares`.
    """

    placement: LayerPlacement
    quotas_C: tuple[int, ...] | None = None


class Planner(Protocol):
    """Planner of copies.

    `rule` names the function of plan/splitting/split.py that splits rows over its copies.
    """

    rule: ClassVar[Rule]

    def plan(self, loads: np.ndarray, homes: LayerPlacement, topology: Topology, costs: Costs,
             max_copies: int) -> LayerPlan:
        """Plan the copies of one layer.

        Args:
            loads: rows expected of each expert, int64 [E], or of each expert from each node, int64 [N, E].
            homes: homes and sliced experts of the layer.
            topology: positions and nodes.
            costs: what a row, an expert and a link cost.
            max_copies: copies that a position has memory for.
        """
        ...


@runtime_checkable
class SupportsRehoming(Protocol):
    """Planner that also moves homes, now and then: the only change that moves optimizer state."""

    def rehome(self, loads: Mapping[str, np.ndarray], placement: ExpertPlacement, topology: Topology,
               costs: Mapping[str, Costs]) -> ExpertPlacement:
        """Choose homes for all layers together.

        Args:
            loads: rows expected of each expert, int64 [E] by router.
            placement: homes of all layers.
            topology: positions and nodes.
            costs: what a row, an expert and a link cost, by router.

        Returns:
            The same homes or better ones, without copies.
        """
        ...


@runtime_checkable
class SupportsSlicing(Protocol):
    """Planner that decides which experts are sliced, whenever homes are chosen.

    Under other planners the hottest are.
    """

    def choose_sliced(self, loads_E: np.ndarray, homes: LayerPlacement, topology: Topology, costs: Costs,
                      max_copies: int, most: int) -> tuple[int, ...]:
        """Choose the experts of one layer whose parameters lie in slices over all positions.

        Args:
            loads_E: rows expected of each expert, int64 [E].
            homes: homes of the layer, with the experts that are sliced now.
            topology: positions and nodes.
            costs: what a row, an expert and a link cost.
            max_copies: copies that a position has memory for.
            most: experts that may be sliced.
        """
        ...


def max_hidden_copies(topology: Topology, costs: Costs, num_experts: int) -> int:
    """Experts whose matrices one link brings while other work hides it; t in the paper."""
    rate = costs.between if topology.nodes > 1 else costs.inside
    if math.isinf(rate) or costs.expert_bytes * num_experts <= costs.hidden_s * rate:
        return num_experts
    return int(costs.hidden_s * rate // costs.expert_bytes)


def copies_per_position(max_copies: int, topology: Topology, costs: Costs, num_experts: int) -> int:
    """Copies that a position may take; m in the paper.

    Args:
        max_copies: copies that its memory has room for.
        topology: positions and nodes.
        costs: what an expert and a link cost.
        num_experts: experts of the layer.

    Returns:
        The smaller of `max_copies` and what a link brings in time.
    """
    return min(max_copies, max_hidden_copies(topology, costs, num_experts))


def loads_by_expert(loads: np.ndarray) -> np.ndarray:
    """Loads of the experts, int64 [E], from such loads or from loads by node [N, E]."""
    loads = np.asarray(loads, dtype=np.int64)
    return loads if loads.ndim == 1 else loads.sum(0)


def loads_by_node(loads: np.ndarray, topology: Topology) -> np.ndarray:
    """Loads of the experts by node, int64 [N, E].

    Where nodes are not known, all positions count as equal sources.
    """
    loads = np.asarray(loads, dtype=np.int64)
    if loads.ndim == 2:
        assert len(loads) == topology.nodes, (loads.shape, topology)
        return loads
    ends_N = np.minimum(np.arange(1, topology.nodes + 1) * topology.per_node, topology.positions)
    return np.diff(loads[None] * ends_N[:, None] // topology.positions, axis=0, prepend=0)


def hottest_first(loads_E: np.ndarray) -> np.ndarray:
    """Expert ids by load, descending; ties by id."""
    return np.argsort(-loads_E, kind="stable")
