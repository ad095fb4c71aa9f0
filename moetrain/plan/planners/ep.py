"""Plain expert parallelism: no copies. What every other planner is measured against."""

from typing import ClassVar

import numpy as np

from moetrain.plan.cost.machine import Costs, Topology
from moetrain.plan.placement import LayerPlacement
from moetrain.plan.planners.base import LayerPlan, Planner, Rule


class ExpertParallel(Planner):
    """The homes as they are."""

    rule: ClassVar[Rule] = "local_first"

    def plan(self, loads: np.ndarray, homes: LayerPlacement, topology: Topology, costs: Costs, room: int) -> LayerPlan:
        return LayerPlan(homes.without_copies())
