"""FasterMoE's shadowing: the hottest experts are copied to all positions and computed where their tokens are.

PPoPP 2022; rules from `laekov/fastmoe`, fmoe/fastermoe/shadow_policy.py. Experts are visited by load,
descending. To shadow one more costs the sending of its matrices, and lowers the bottleneck to the load B of
the next expert. This goes on while

    B * (forward and backward computing of a row) + 4 * B * (sending of a row) + sending of the matrices so
    far

falls. The bottleneck is an expert's load, not a position's, as published. Unlike there, memory also ends the
walk.

Shapes: E experts.
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
    """Planner that copies the hottest experts to all positions."""

    rule: ClassVar[Rule] = "local_first"

    def plan(self, loads: np.ndarray, homes: LayerPlacement, topology: Topology, costs: Costs,
             max_copies: int) -> LayerPlan:
        loads_E = loads_by_expert(loads)
        most = copies_per_position(max_copies, topology, costs, len(loads_E))
        rate = costs.between if topology.nodes > 1 else costs.inside
        chosen = choose_shadowed(loads_E, costs.row_s, send_row_s=costs.row_bytes / rate,
                                 send_expert_s=costs.expert_bytes / rate)[:most]
        return LayerPlan(LayerPlacement(homes.home, homes.positions, tuple(
            (expert, position) for expert in chosen for position in range(homes.positions)
            if position != homes.home[expert])))


def choose_shadowed(loads_E: np.ndarray, row_s: float, send_row_s: float, send_expert_s: float) -> list[int]:
    """Choose the experts that are worth shadowing.

    Args:
        loads_E: rows of each expert, int64 [E].
        row_s: seconds that a row is computed on, forward and backward.
        send_row_s: seconds that a row is sent, one way.
        send_expert_s: seconds that an expert's matrices are sent.

    Returns:
        Expert ids, the hottest first; never all experts.
    """
    order = hottest_first(loads_E).tolist()
    bottleneck_row_s = row_s + 4 * send_row_s
    best_s = bottleneck_row_s * int(loads_E[order[0]])
    chosen: list[int] = []
    for expert, following in zip(order, order[1:], strict=False):
        with_it_s = bottleneck_row_s * int(loads_E[following]) + send_expert_s * (len(chosen) + 1)
        if with_it_s >= best_s:
            break
        best_s = with_it_s
        chosen.append(expert)
    return chosen
