"""Calibration after the gate: copies that the plan lacks, by the loads that there really are (Hecate, arXiv 2502.02581).

    wanted    the planner's answer to the true loads
    added     of its copies those that are missing, of the hottest experts first, as far as there is room
    gain      what they save of computing and of the rows' exchanges, by the model of plan/cost/step_time.py
    price     their weights travel now, and nothing hides that; and what their gradients expose on their way home

They are added if the gain is larger than the price. The counts are those of a layer's first micro-batch in a step, scaled to
the step, whose later micro-batches have these copies too. A pure function of integers that all positions have exchanged:
they decide alike without another message.

Shapes: P positions, N nodes, E experts.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from moetrain.plan.cost.machine import Costs, Topology
from moetrain.plan.cost.step_time import gather_seconds, step_time
from moetrain.plan.placement import LayerPlacement
from moetrain.plan.planners.base import LayerPlan, Planner
from moetrain.plan.splitting.rules import rule_of


def calibrate(n_PE: Tensor, plan: LayerPlan, planner: Planner, topology: Topology, costs: Costs,
               room: int) -> LayerPlan | None:
    """The plan with more copies, or None where more would not pay.

    n_PE: rows of the step from every position for every expert, on the host. room: copies that a position has memory for, those of the
    plan included.
    """
    extended = add_missing_copies(n_PE, plan, planner, topology, costs, room)
    if extended is None:
        return None
    gain_s = _rows_seconds(n_PE, plan, planner, topology, costs) - _rows_seconds(n_PE, extended, planner, topology, costs)
    return extended if gain_s > _copies_price_s(plan.placement, extended.placement, topology, costs) else None


def add_missing_copies(n_PE: Tensor, plan: LayerPlan, planner: Planner, topology: Topology, costs: Costs,
             room: int) -> LayerPlan | None:
    """The plan with all missing copies that there is room for; None if there are none."""
    by_node_NE = n_PE.new_zeros(topology.nodes, n_PE.shape[1])
    by_node_NE.index_add_(0, torch.arange(topology.positions) // topology.per_node, n_PE)
    wanted = planner.plan(by_node_NE.numpy(), plan.placement.without_copies(), topology, costs, room)
    missing = wanted.placement.beyond(plan.placement).copies
    added = _hottest_that_fit(missing, plan.placement, n_PE.sum(0).numpy(), room)
    if not added:
        return None
    placement = replace(plan.placement, copies=(*plan.placement.copies, *added))
    return LayerPlan(placement, None if wanted.quotas_C is None else _quotas(wanted, placement))


def _hottest_that_fit(missing: tuple[tuple[int, int], ...], placement: LayerPlacement, loads_E: np.ndarray,
              room: int) -> list[tuple[int, int]]:
    free_copies = [room - len(placement.copies_at(position)) for position in range(placement.positions)]
    added = []
    for expert, position in sorted(missing, key=lambda copy: (-int(loads_E[copy[0]]), copy)):
        if free_copies[position] > 0:
            free_copies[position] -= 1
            added.append((expert, position))
    return added


def _quotas(wanted: LayerPlan, placement: LayerPlacement) -> tuple[int, ...]:
    """The wanted quotas by the replicas that there are; those of copies that found no room go to the homes."""
    rows = dict.fromkeys(((expert, position) for expert, position, _ in placement.replicas), 0)
    for (expert, position, _), quota in zip(wanted.placement.replicas, wanted.quotas_C, strict=True):
        rows[(expert, position) if (expert, position) in rows else (expert, placement.home[expert])] += quota
    return tuple(rows.values())


def _rows_seconds(n_PE: Tensor, plan: LayerPlan, planner: Planner, topology: Topology, costs: Costs) -> float:
    split_PC = rule_of(planner.rule, plan, topology, costs).split(n_PE, plan.placement, 0)
    times = step_time(split_PC, plan.placement, topology, costs)
    return times.compute_s + times.link_s


def _copies_price_s(planned: LayerPlacement, placement: LayerPlacement, topology: Topology, costs: Costs) -> float:
    home_s, planned_s = (max(0.0, gather_seconds(copies, topology, costs) - 2 * costs.hidden_s)
                         for copies in (placement, planned))
    return gather_seconds(placement.beyond(planned), topology, costs) + home_s - planned_s
