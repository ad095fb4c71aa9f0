"""The rules of plan/splitting/split.py as the dispatcher takes them: how the rows of an expert are divided among its replicas.

`looks_at_all` says whether a rule must see the counts of all positions, which costs no further exchange but a larger one.
Such a rule wants them on the host and answers there; the other works where its counts are.
"""

import torch
from torch import Tensor

from moetrain.plan.cost.machine import Costs, Topology
from moetrain.plan.placement import LayerPlacement
from moetrain.plan.planners.base import LayerPlan, Rule
from moetrain.plan.splitting.split import local_first, shares, waterfill


def rule_of(rule: Rule, plan: LayerPlan, topology: Topology, costs: Costs) -> "LocalFirst | Waterfill | Shares":
    """What divides rows under a plan whose planner has this rule."""
    if rule == "shares":
        return Shares(topology, plan.quotas_C)
    return Waterfill(topology, costs) if rule == "waterfill" else LocalFirst(topology)


class LocalFirst:
    """Own replica, then those on the node, then all."""

    looks_at_all = False

    def __init__(self, topology: Topology) -> None:
        self.topology = topology

    def split(self, n_PE: Tensor, placement: LayerPlacement, first: int) -> Tensor:
        return local_first(n_PE, placement, self.topology, first)


class Waterfill:
    """The least-loaded replica, off the node only where that pays."""

    looks_at_all = True

    def __init__(self, topology: Topology, costs: Costs) -> None:
        self.topology, self.costs = topology, costs

    def split(self, n_PE: Tensor, placement: LayerPlacement, first: int) -> Tensor:
        return waterfill(n_PE, placement, self.topology, self.costs)


class Shares:
    """By quotas that the planner has set, by replica."""

    looks_at_all = True

    def __init__(self, topology: Topology, quotas_C: tuple[int, ...]) -> None:
        self.topology, self.quotas_C = topology, torch.tensor(quotas_C, dtype=torch.int64)

    def split(self, n_PE: Tensor, placement: LayerPlacement, first: int) -> Tensor:
        return shares(n_PE, self.quotas_C, placement, self.topology)
