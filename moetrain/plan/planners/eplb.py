"""EPLB: replicate the experts with the largest load per replica, then pack into the least loaded bins.

Rules from `deepseek-ai/EPLB`, eplb.py.

    replicate   each spare slot goes to argmax load / replicas
    pack        items by load, descending, each into the least loaded bin that has a free slot
    rebalance   both, as published: all experts are placed anew. Where nodes divide the expert groups, groups
                are packed onto nodes first and everything else stays within a node; otherwise the job counts
                as one node

As published, every expert is placed anew. A plan has homes, so the loads of homes are in the bins before
copies are packed, and a position holds an expert once. Homes move by the published packing without spare
slots.

Shapes: E experts.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from moetrain.plan.cost.machine import Costs, Topology
from moetrain.plan.placement import ExpertPlacement, LayerPlacement
from moetrain.plan.planners.base import LayerPlan, Planner, Rule, copies_per_position, loads_by_expert
from moetrain.plan.planners.hecate import replica_counts


class Eplb(Planner):
    """EPLB's replication and packing, for copies beside given homes and for homes.

    Args:
        groups: groups of neighboring experts that a token's choice is limited to; 1 where there are none.
    """

    rule: ClassVar[Rule] = "local_first"
    BOUNDS = {"groups": "1 or more; divides num_experts"}

    def __init__(self, *, groups: int = 1) -> None:
        self.groups = groups

    def plan(self, loads: np.ndarray, homes: LayerPlacement, topology: Topology, costs: Costs,
             max_copies: int) -> LayerPlan:
        loads_E = loads_by_expert(loads)
        most = copies_per_position(max_copies, topology, costs, len(loads_E))
        ranges = [range(topology.positions)]
        if topology.nodes > 1 and self._packs_by_node(topology):
            ranges = [topology.positions_of(node) for node in range(topology.nodes)]
        copies = [copy for positions in ranges for copy in _copies(loads_E, homes, positions, most)]
        return LayerPlan(LayerPlacement(homes.home, homes.positions, tuple(copies)))

    def rehome(self, loads: Mapping[str, np.ndarray], placement: ExpertPlacement, topology: Topology,
               costs: Mapping[str, Costs]) -> ExpertPlacement:
        nodes = topology.nodes if self._packs_by_node(topology) else 1
        moved = []
        for name, layer in placement.layers:
            if layer.num_experts % topology.positions:
                moved.append((name, layer.without_copies()))       # EPLB packs into bins of equal size only
                continue
            loads_E, experts = loads_by_expert(loads[name]), layer.num_experts
            held = rebalance(loads_E, experts, self.groups, nodes, topology.positions)
            home = {expert: at for at, held_here in enumerate(held) for expert in held_here}
            moved.append((name, LayerPlacement(tuple(home[e] for e in range(experts)), topology.positions)))
        return ExpertPlacement(tuple(moved))

    def _packs_by_node(self, topology: Topology) -> bool:
        return self.groups % topology.nodes == 0 and topology.positions % topology.nodes == 0


def rebalance(loads_E: np.ndarray, slots: int, groups: int, nodes: int, positions: int) -> list[list[int]]:
    """Replicate and place all experts, as published.

    Args:
        loads_E: rows of each expert, int64 [E].
        slots: physical slots of all positions together.
        groups: groups of neighboring experts.
        nodes: nodes of the job; where they do not divide the groups, the job counts as one node.
        positions: positions of the job.

    Returns:
        Experts of each position, in the order of slots; an expert may come twice.
    """
    if groups % nodes:
        groups = nodes = 1
    size = len(loads_E) // groups
    by_group = [int(load) for load in np.asarray(loads_E).reshape(groups, size).sum(1)]
    held = []
    for node_groups in pack(by_group, list(range(groups)), [groups // nodes] * nodes):
        experts = [group * size + i for group in node_groups for i in range(size)]
        order, counts = replicate([int(loads_E[expert]) for expert in experts], slots // nodes)
        items = [int(loads_E[experts[i]]) / counts[i] for i in order]
        bins = positions // nodes
        held += pack(items, [experts[i] for i in order], [slots // positions] * bins)
    return held


def replicate(loads: Sequence[int], slots: int) -> tuple[list[int], list[int]]:
    """Replicate experts until all slots are taken, each time that with the largest load per replica.

    Args:
        loads: rows of each expert.
        slots: physical slots to fill; at least one for each expert.

    Returns:
        Expert of each slot, first every expert once; and the number of replicas of each expert.
    """
    order, counts = list(range(len(loads))), [1] * len(loads)
    for _ in range(slots - len(loads)):
        chosen = max(range(len(loads)), key=lambda i: (loads[i] / counts[i], -i))
        order.append(chosen)
        counts[chosen] += 1
    return order, counts


def pack(loads: Sequence[float], items: Sequence[int], free: list[int], filled: list[float] | None = None,
         holds: list[set[int]] | None = None) -> list[list[int]]:
    """Pack items into bins, the heaviest first, each into the least loaded bin that can take it.

    Args:
        loads: load of each item.
        items: ids of the items.
        free: free slots of each bin.
        filled: load of each bin at the start; none by default.
        holds: ids that each bin holds already and does not take again; changed in place. None lets an id come
            twice.

    Returns:
        Ids in each bin. An item that no bin can take is left out.
    """
    bins: list[list[int]] = [[] for _ in free]
    if holds is None and len(items) == len(free) == sum(free):
        return [[item] for item in items]            # one item a bin: published so, in their own order
    filled = list(filled or [0] * len(free))
    for i in sorted(range(len(items)), key=lambda i: -loads[i]):
        candidates = [at for at in range(len(free))
                      if len(bins[at]) < free[at] and not (holds and items[i] in holds[at])]
        if not candidates:
            continue
        at = min(candidates, key=filled.__getitem__)
        bins[at].append(items[i])
        filled[at] += loads[i]
        if holds:
            holds[at].add(items[i])
    return bins


def _copies(loads_E: np.ndarray, homes: LayerPlacement, positions: range, most: int) -> list[tuple[int, int]]:
    """Copies (expert, position) among these positions of the experts at home there, `most` to a position."""
    experts = [expert for at in positions for expert in homes.experts_of(at)]
    counts = replica_counts(loads_E, sorted(experts), len(positions) * most, len(positions))
    load = {expert: int(loads_E[expert]) / counts[expert] for expert in experts}
    items = [expert for expert in sorted(experts) for _ in range(counts[expert] - 1)]
    holds = [set(homes.experts_of(at)) for at in positions]
    packed = pack([load[expert] for expert in items], items, [most] * len(positions),
                  [sum(load[expert] for expert in homes.experts_of(at)) for at in positions], holds)
    return [(expert, at) for at, added in zip(positions, packed, strict=True) for expert in added]
