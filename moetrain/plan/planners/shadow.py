"""FasterMoE's shadowing: the hottest experts are copied everywhere and computed where their tokens are.

PPoPP 2022; rules from `laekov/fastmoe`, fmoe/fastermoe/shadow_policy.py. Walking down the experts by load, shadowing one
more costs the sending of its weights and lowers the bottleneck to the next expert's load B; it goes on while

    B * (forward and backward computing of a row) + 4 * B * (sending of a row) + weights sent so far

falls. The bottleneck is an expert's load, not a position's, as published. Here memory ends the walk as well.
"""

from typing import ClassVar

import numpy as np

from moetrain.plan.cost.machine import Costs, Topology
from moetrain.plan.placement import LayerPlacement
from moetrain.plan.planners.base import (
    LayerPlan,
    Planner,
    Rule,
    copies_per_position,
    hottest_first,
    loads_by_expert,
)


class Shadow(Planner):
    """Copies of the hottest experts at all positions."""

    rule: ClassVar[Rule] = "local_first"

    def plan(self, loads: np.ndarray, homes: LayerPlacement, topology: Topology, costs: Costs, room: int) -> LayerPlan:
        loads_E = loads_by_expert(loads)
        per_position = copies_per_position(room, topology, costs, len(loads_E))
        rate = costs.between if topology.nodes > 1 else costs.inside
        chosen = choose_shadowed(loads_E, costs.row_s, costs.row_bytes / rate, costs.expert_bytes / rate)[:per_position]
        return LayerPlan(LayerPlacement(homes.home, homes.positions, tuple(
            (expert, position) for expert in chosen for position in range(homes.positions)
            if position != homes.home[expert])))


def choose_shadowed(loads_E: np.ndarray, row_s: float, send_row_s: float, send_expert_s: float) -> list[int]:
    """Experts worth shadowing, hottest first; never all of them."""
    order = hottest_first(loads_E).tolist()
    a_row_s = row_s + 4 * send_row_s
    best_s = a_row_s * int(loads_E[order[0]])
    chosen: list[int] = []
    for expert, following in zip(order, order[1:], strict=False):
        with_it_s = a_row_s * int(loads_E[following]) + send_expert_s * (len(chosen) + 1)
        if with_it_s >= best_s:
            break
        best_s = with_it_s
        chosen.append(expert)
    return chosen
