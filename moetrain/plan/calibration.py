"""Calibration after the gate: add copies that the plan lacks, by the loads that this step really has.

From Hecate (arXiv 2502.02581). The decision for one layer:

    wanted    the planner's answer to the true loads
    added     missing copies of it, those of the hottest experts first, as many as memory has room for
    gain      time that they save in computing and in exchanges of rows, by the model of cost/step_time.py
    price     time to send their matrices now, when nothing hides it, and the exposed time of their gradients

The copies are added if the gain exceeds the price. The counts are those of a layer's first micro-batch in a
step, scaled to the step, since the later micro-batches have these copies too. All functions here are pure
functions of integers that all positions have exchanged, so all positions decide alike without another
message.

Shapes: P positions, N nodes, E experts, C replicas.
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
              max_copies: int) -> LayerPlan | None:
    """Add copies to a plan if that pays.

    Args:
        n_PE: int64 [P, E], rows of the step from every position for every expert, on the host.
        plan: the plan of this step, made from a forecast.
        planner: the planner that made it.
        topology: positions and nodes.
        costs: what a row, an expert and a link cost.
        max_copies: copies that a position has memory for, including those of the plan.

    Returns:
        The plan with more copies, or None where more would not pay.
    """
    extended = add_missing_copies(n_PE, plan, planner, topology, costs, max_copies)
    if extended is None:
        return None
    gain_s = (_rows_seconds(n_PE, plan, planner, topology, costs)
              - _rows_seconds(n_PE, extended, planner, topology, costs))
    return extended if gain_s > _copies_price_s(plan.placement, extended.placement, topology, costs) else None


def add_missing_copies(n_PE: Tensor, plan: LayerPlan, planner: Planner, topology: Topology, costs: Costs,
                       max_copies: int) -> LayerPlan | None:
    """Add all missing copies that memory has room for, whether or not they pay. Arguments as in `calibrate`.

    Returns:
        The plan with more copies, or None if none can be added.
    """
    by_node_NE = n_PE.new_zeros(topology.nodes, n_PE.shape[1])
    by_node_NE.index_add_(0, torch.arange(topology.positions) // topology.per_node, n_PE)
    wanted = planner.plan(by_node_NE.numpy(), plan.placement.without_copies(), topology, costs, max_copies)
    missing = wanted.placement.beyond(plan.placement).copies
    added = _hottest_that_fit(missing, plan.placement, n_PE.sum(0).numpy(), max_copies)
    if not added:
        return None
    placement = replace(plan.placement, copies=(*plan.placement.copies, *added))
    return LayerPlan(placement, None if wanted.quotas_C is None else _quotas(wanted, placement))


def _hottest_that_fit(missing: tuple[tuple[int, int], ...], placement: LayerPlacement, loads_E: np.ndarray,
                      max_copies: int) -> list[tuple[int, int]]:
    """Of the missing copies those that positions have room for, the hottest experts first."""
    copies_left = [max_copies - len(placement.copies_at(position)) for position in range(placement.positions)]
    added = []
    for expert, position in sorted(missing, key=lambda copy: (-int(loads_E[copy[0]]), copy)):
        if copies_left[position] > 0:
            copies_left[position] -= 1
            added.append((expert, position))
    return added


def _quotas(wanted: LayerPlan, placement: LayerPlacement) -> tuple[int, ...]:
    """The wanted quotas by the replicas that exist; those of copies that found no room go to the home."""
    assert wanted.quotas_C is not None
    rows = dict.fromkeys(((expert, position) for expert, position, _ in placement.replicas), 0)
    for (expert, position, _), quota in zip(wanted.placement.replicas, wanted.quotas_C, strict=True):
        rows[(expert, position) if (expert, position) in rows else (expert, placement.home[expert])] += quota
    return tuple(rows.values())


def _rows_seconds(n_PE: Tensor, plan: LayerPlan, planner: Planner, topology: Topology, costs: Costs) -> float:
    """Time of computing and exchanging rows under a plan. The gain is a difference of two such times."""
    split_PC = rule_of(planner.rule, plan, topology, costs).split(n_PE, plan.placement, 0)
    times = step_time(split_PC, plan.placement, topology, costs)
    return times.compute_s + times.link_s


def _copies_price_s(planned: LayerPlacement, placement: LayerPlacement, topology: Topology,
                    costs: Costs) -> float:
    """Time to bring the added copies, none of it hidden, and the additional exposed time of gradients."""
    home_s, planned_s = (max(0.0, gather_seconds(copies, topology, costs) - 2 * costs.hidden_s)
                         for copies in (placement, planned))
    return gather_seconds(placement.beyond(planned), topology, costs) + home_s - planned_s
