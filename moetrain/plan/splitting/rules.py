"""Split rules as the dispatcher uses them: how the rows of an expert are divided among its replicas.

A rule is an object with two members:

    split(n_PE, placement, first)   rows for each replica, int64 [P, C], from the counts n_PE of consecutive
                                    sources, int64 [P, E], the first of them at position `first`
    needs_all_counts                whether the rule needs the counts of all positions; that takes no further
                                    exchange, only a larger one

A rule that needs all counts takes them on the host and answers there. The other works on the device of its
counts. The arithmetic is in plan/splitting/split.py.

Shapes: P sources, E experts, C replicas.
"""

import torch
from torch import Tensor

from moetrain.plan.cost.machine import Costs, Topology
from moetrain.plan.placement import LayerPlacement
from moetrain.plan.planners.base import LayerPlan, Rule
from moetrain.plan.splitting.split import local_first, shares, waterfill


def rule_of(rule: Rule, plan: LayerPlan, topology: Topology,
            costs: Costs) -> "LocalFirst | Waterfill | Shares":
    """Make the split rule of a plan.

    Args:
        rule: the rule of the planner that made it.
        plan: its quotas are what `shares` follows.
        topology: positions and nodes.
        costs: what a row, an expert and a link cost; for `waterfill`.
    """
    if rule == "shares":
        assert plan.quotas_C is not None, "the planner has set no quotas"
        return Shares(topology, plan.quotas_C)
    return Waterfill(topology, costs) if rule == "waterfill" else LocalFirst(topology)


class LocalFirst:
    """Split rows over the replica at their source, else over those on its node, else over all."""

    needs_all_counts = False

    def __init__(self, topology: Topology) -> None:
        self.topology = topology

    def split(self, n_PE: Tensor, placement: LayerPlacement, first: int) -> Tensor:
        return local_first(n_PE, placement, self.topology, first)


class Waterfill:
    """Split rows so that loads are level, with rows leaving their node only where that pays."""

    needs_all_counts = True

    def __init__(self, topology: Topology, costs: Costs) -> None:
        self.topology, self.costs = topology, costs

    def split(self, n_PE: Tensor, placement: LayerPlacement, first: int) -> Tensor:
        return waterfill(n_PE, placement, self.topology, self.costs)


class Shares:
    """Split rows by the quotas that the planner has set for each replica."""

    needs_all_counts = True

    def __init__(self, topology: Topology, quotas_C: tuple[int, ...]) -> None:
        self.topology, self.quotas_C = topology, torch.tensor(quotas_C, dtype=torch.int64)

    def split(self, n_PE: Tensor, placement: LayerPlacement, first: int) -> Tensor:
        return shares(n_PE, self.quotas_C, placement, self.topology)
