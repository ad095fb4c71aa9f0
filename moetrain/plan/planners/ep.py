"""Plain expert parallelism: no copies. The baseline that every other planner is measured against."""

from typing import ClassVar

import numpy as np

from moetrain.plan.cost.machine import Costs, Topology
from moetrain.plan.placement import LayerPlacement
from moetrain.plan.planners.base import LayerPlan, Planner, Rule


class ExpertParallel(Planner):
    """Planner that leaves the homes as they are and adds no copies."""

    rule: ClassVar[Rule] = "local_first"

    def plan(self, loads: np.ndarray, homes: LayerPlacement, topology: Topology, costs: Costs,
             max_copies: int) -> LayerPlan:
        return LayerPlan(homes.without_copies())
