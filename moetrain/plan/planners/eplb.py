"""EPLB (`deepseek-ai/EPLB`, eplb.py): spare slots to the largest load per replica, then heaviest first into the least
loaded bin.

    replicate   each spare slot goes to argmax load / replicas
    pack        items by load, descending, each into the least loaded bin that has a free slot
    rebalance   both, as published: all experts placed anew. Where nodes divide the expert groups, groups are packed onto
                nodes first and everything else stays within a node; else the job is one node

Published it places every expert anew; a plan has homes, so their loads lie in the bins before copies are packed, and a
position holds an expert once. Homes move by the published packing without spare slots.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from moetrain.plan.cost.machine import Costs, Topology
from moetrain.plan.placement import ExpertPlacement, LayerPlacement
from moetrain.plan.planners.base import LayerPlan, Planner, Rule, copies_per_position, loads_by_expert
from moetrain.plan.planners.hecate import replica_counts


class Eplb(Planner):
    """groups: of neighbouring experts that a token's choice is limited to; 1 where there are none."""

    rule: ClassVar[Rule] = "local_first"
    BOUNDS = {"groups": "1 or more; divides num_experts"}

    def __init__(self, *, groups: int = 1) -> None:
        self.groups = groups

    def plan(self, loads: np.ndarray, homes: LayerPlacement, topology: Topology, costs: Costs, room: int) -> LayerPlan:
        loads_E = loads_by_expert(loads)
        per_position = copies_per_position(room, topology, costs, len(loads_E))
        nodes = topology.nodes if self._by_node(topology) else 1
        ranges = [topology.positions_of(node) for node in range(nodes)] if nodes > 1 else [range(topology.positions)]
        copies = [pair for positions in ranges for pair in _copies(loads_E, homes, positions, per_position)]
        return LayerPlan(LayerPlacement(homes.home, homes.positions, tuple(copies)))

    def rehome(self, loads: Mapping[str, np.ndarray], placement: ExpertPlacement, topology: Topology,
               costs: Costs) -> ExpertPlacement:
        nodes = topology.nodes if self._by_node(topology) else 1
        moved = []
        for name, layer in placement.layers:
            if layer.num_experts % topology.positions:
                moved.append((name, layer.without_copies()))       # bins of equal size are all that it knows
                continue
            held = rebalance(loads_by_expert(loads[name]), layer.num_experts, self.groups, nodes, topology.positions)
            home = {expert: at for at, experts in enumerate(held) for expert in experts}
            moved.append((name, LayerPlacement(tuple(home[e] for e in range(layer.num_experts)), topology.positions)))
        return ExpertPlacement(tuple(moved))

    def _by_node(self, topology: Topology) -> bool:
        return self.groups % topology.nodes == 0 and topology.positions % topology.nodes == 0


def rebalance(loads_E: np.ndarray, slots: int, groups: int, nodes: int, positions: int) -> list[list[int]]:
    """Experts of each position, in slot order; an expert may come twice. slots: of all positions together."""
    if groups % nodes:
        groups = nodes = 1
    size = len(loads_E) // groups
    by_group = [int(load) for load in np.asarray(loads_E).reshape(groups, size).sum(1)]
    held = []
    for cell in pack(by_group, list(range(groups)), [groups // nodes] * nodes):
        experts = [group * size + i for group in cell for i in range(size)]
        order, counts = replicate([int(loads_E[expert]) for expert in experts], slots // nodes)
        items = [int(loads_E[experts[i]]) / counts[i] for i in order]
        bins = positions // nodes
        held += pack(items, [experts[i] for i in order], [slots // positions] * bins)
    return held


def replicate(loads: Sequence[int], slots: int) -> tuple[list[int], list[int]]:
    """The expert of each slot, experts themselves first, and how many each has."""
    order, counts = list(range(len(loads))), [1] * len(loads)
    for _ in range(slots - len(loads)):
        chosen = max(range(len(loads)), key=lambda i: (loads[i] / counts[i], -i))
        order.append(chosen)
        counts[chosen] += 1
    return order, counts


def pack(loads: Sequence[float], items: Sequence[int], free: list[int], filled: list[float] | None = None,
         holds: list[set[int]] | None = None) -> list[list[int]]:
    """Items of each bin. free: slots of the bins. filled: their loads at the start. holds: items not to be added again."""
    bins: list[list[int]] = [[] for _ in free]
    if holds is None and len(items) == len(free) == sum(free):
        return [[item] for item in items]            # one a bin: published so, in their own order
    filled = list(filled or [0] * len(free))
    for i in sorted(range(len(items)), key=lambda i: -loads[i]):
        candidates = [at for at in range(len(free)) if len(bins[at]) < free[at] and not (holds and items[i] in holds[at])]
        if not candidates:
            continue
        at = min(candidates, key=filled.__getitem__)
        bins[at].append(items[i])
        filled[at] += loads[i]
        if holds:
            holds[at].add(items[i])
    return bins


def _copies(loads_E: np.ndarray, homes: LayerPlacement, positions: range, per_position: int) -> list[tuple[int, int]]:
    """Copies (expert, position) of the experts at home in these positions, to these positions."""
    experts = [expert for at in positions for expert in homes.experts_of(at)]
    counts = replica_counts(loads_E, sorted(experts), len(positions) * per_position, len(positions))
    load = {expert: int(loads_E[expert]) / counts[expert] for expert in experts}
    items = [expert for expert in sorted(experts) for _ in range(counts[expert] - 1)]
    holds = [set(homes.experts_of(at)) for at in positions]
    packed = pack([load[expert] for expert in items], items, [per_position] * len(positions),
                  [sum(load[expert] for expert in homes.experts_of(at)) for at in positions], holds)
    return [(expert, at) for at, added in zip(positions, packed, strict=True) for expert in added]
