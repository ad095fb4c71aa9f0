"""What a planner is: loads and homes in, copies out. One file each, so that all can be compared on equal terms.

A planner is a pure function of integers that all ranks share and of configured numbers: equal loads give equal plans. It
gets the same forecast, memory and bandwidth as every other. Two numbers follow from these for all of them (Hecate, arXiv
2502.02581, section 3; max_hidden_copies and copies_per_position below).

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
    """placement: the homes that were given, and copies. quotas_C: rows per replica, in the order of
    `placement.replicas`; of planners whose rule is `shares` alone."""

    placement: LayerPlacement
    quotas_C: tuple[int, ...] | None = None


class Planner(Protocol):
    """rule: the function of plan/splitting/split.py that splits rows over the copies."""

    rule: ClassVar[Rule]

    def plan(self, loads: np.ndarray, homes: LayerPlacement, topology: Topology, costs: Costs, room: int) -> LayerPlan:
        """Copies for one layer.

        loads: rows expected of each expert, int64 [E], or of each expert from each node, [N, E].
        room: copies that a position has memory for.
        """
        ...


@runtime_checkable
class SupportsRehoming(Protocol):
    """A planner that also moves homes, rarely: the only thing that moves optimizer state."""

    def rehome(self, loads: Mapping[str, np.ndarray], placement: ExpertPlacement, topology: Topology,
               costs: Costs) -> ExpertPlacement:
        """The same homes or better ones, without copies; loads [E] by router."""
        ...


@runtime_checkable
class SupportsSlicing(Protocol):
    """A planner that decides whose homes are cut up, when homes are looked at. Without one it is all that may be."""

    def choose_sliced(self, loads_E: np.ndarray, homes: LayerPlacement, topology: Topology, costs: Costs, room: int,
               most: int) -> tuple[int, ...]:
        """Experts of one layer to lie in pieces: at most so many, of the hottest. homes: with those that do now."""
        ...


def max_hidden_copies(topology: Topology, costs: Costs, num_experts: int) -> int:
    """t: experts whose weights one link brings while other work hides it."""
    rate = costs.between if topology.nodes > 1 else costs.inside
    if math.isinf(rate) or costs.expert_bytes * num_experts <= costs.hidden_s * rate:
        return num_experts
    return int(costs.hidden_s * rate // costs.expert_bytes)


def copies_per_position(room: int, topology: Topology, costs: Costs, num_experts: int) -> int:
    """m: copies that a position may take: what its memory has room for and the link brings in time."""
    return min(room, max_hidden_copies(topology, costs, num_experts))


def loads_by_expert(loads: np.ndarray) -> np.ndarray:
    """Loads by expert, int64 [E]."""
    loads = np.asarray(loads, dtype=np.int64)
    return loads if loads.ndim == 1 else loads.sum(0)


def loads_by_node(loads: np.ndarray, topology: Topology) -> np.ndarray:
    """Loads by node, int64 [N, E]; where no node is known, as if all positions had equal parts."""
    loads = np.asarray(loads, dtype=np.int64)
    if loads.ndim == 2:
        assert len(loads) == topology.nodes, (loads.shape, topology)
        return loads
    ends_N = np.minimum(np.arange(1, topology.nodes + 1) * topology.per_node, topology.positions)
    return np.diff(loads[None] * ends_N[:, None] // topology.positions, axis=0, prepend=0)


def hottest_first(loads_E: np.ndarray) -> np.ndarray:
    """Expert ids by load, descending; ties by id."""
    return np.argsort(-loads_E, kind="stable")
