"""Calibration after the gate: it adds the copies that pay, as many as there is room for, and nothing else."""

from typing import NamedTuple

import numpy as np
import pytest
import torch

from moetrain.plan.calibration import add_missing_copies, calibrate
from moetrain.plan.cost.machine import Costs, Topology
from moetrain.plan.cost.step_time import step_time
from moetrain.plan.loads.synthetic import NAMES, generate
from moetrain.plan.placement import LayerPlacement, contiguous
from moetrain.plan.planners.balanced import Balanced
from moetrain.plan.planners.base import LayerPlan
from moetrain.plan.planners.hecate import Hecate
from moetrain.plan.planners.llep import LeastLoaded
from moetrain.plan.splitting.rules import rule_of

TOPOLOGY = Topology(4, 2)
COSTS = Costs(row_s=1e-6, row_bytes=256, expert_bytes=1e5, inside=1e9, between=5e8, latency_s=1e-5,
              hidden_s=1e-3)
PLANNERS = [Balanced(), Hecate(), LeastLoaded(min_rows=16)]
IDS = ["balanced", "hecate", "llep"]


def counts(name: str, step: int = 0) -> torch.Tensor:
    return torch.from_numpy(generate(name, 1, step + 1, 4, 16, 4096)[step])


def planned(planner, loads_E: np.ndarray, max_copies: int) -> LayerPlan:
    return planner.plan(loads_E, contiguous(16, 4), TOPOLOGY, COSTS, max_copies)


def seconds(planner, plan: LayerPlan, n_PE: torch.Tensor) -> float:
    split_PC = rule_of(planner.rule, plan, TOPOLOGY, COSTS).split(n_PE, plan.placement, 0)
    assert (split_PC >= 0).all() and int(split_PC.sum()) == int(n_PE.sum())
    times = step_time(split_PC, plan.placement, TOPOLOGY, COSTS)
    return times.compute_s + times.link_s


@pytest.mark.parametrize("planner", PLANNERS, ids=IDS)
@pytest.mark.parametrize("name", NAMES)
def test_the_plan_stays_and_no_position_gets_more_than_its_room(planner, name):
    n_PE, plan = counts(name), planned(planner, counts("lognormal_1.5").sum(0).numpy(), 2)
    for max_copies in (2, 3):
        extended = add_missing_copies(n_PE, plan, planner, TOPOLOGY, COSTS, max_copies)
        if extended is not None:
            assert extended.placement.home == plan.placement.home
            assert set(extended.placement.copies) > set(plan.placement.copies)
            assert max(len(extended.placement.copies_at(position)) for position in range(4)) <= max_copies
            seconds(planner, extended, n_PE)                 # every row finds a replica, whatever the rule


@pytest.mark.parametrize("planner", PLANNERS, ids=IDS)
def test_a_hot_expert_that_was_not_expected_is_copied(planner):
    n_PE, plan = counts("hot_expert"), planned(planner, counts("balanced").sum(0).numpy(), 1)
    extended = calibrate(n_PE, LayerPlan(contiguous(16, 4), (0,) * 16), planner, TOPOLOGY, COSTS, 2)
    hottest = int(n_PE.sum(0).argmax())
    assert extended is not None and hottest in {expert for expert, _ in extended.placement.copies}
    assert seconds(planner, extended, n_PE) < seconds(planner, plan, n_PE)


class Wants:
    """A planner that always gives the same answer."""

    def __init__(self, copies, rule="local_first", quotas_C=None) -> None:
        self.copies, self.rule, self.quotas_C = copies, rule, quotas_C

    def plan(self, loads, homes, topology, costs, max_copies) -> LayerPlan:
        return LayerPlan(LayerPlacement(homes.home, homes.positions, self.copies), self.quotas_C)


class Price(NamedTuple):
    """Seconds to send a copy, seconds that forward hides of it, and whether the copy pays."""

    travel_s: int
    hidden_s: int
    pays: bool


@pytest.mark.parametrize("price", [
    Price(24, 0, pays=True), Price(26, 0, pays=False), Price(34, 10, pays=True), Price(36, 10, pays=False),
    Price(49, 99, pays=True), Price(51, 99, pays=False)], ids=str)
def test_the_price_is_a_gather_that_nothing_hides_and_what_its_gradients_expose(price):
    """Half of 100 rows leave the full position: 50 s. Backward hides twice as much as forward could."""
    costs = Costs(row_s=1.0, row_bytes=0.0, expert_bytes=price.travel_s, inside=1.0, between=1.0,
                  hidden_s=price.hidden_s)
    n_PE = torch.tensor([[50, 0], [50, 0]])
    plan, wanted = LayerPlan(LayerPlacement((0, 1), 2)), Wants(((0, 1),))
    assert (calibrate(n_PE, plan, wanted, Topology(2, 2), costs, 1) is not None) == price.pays


def test_what_is_planned_already_is_not_added():
    n_PE = counts("lognormal_1")
    by_node_NE = torch.stack([n_PE[:2].sum(0), n_PE[2:].sum(0)]).numpy()
    plan = planned(Balanced(), by_node_NE, 2)
    assert plan.placement.copies and add_missing_copies(n_PE, plan, Balanced(), TOPOLOGY, COSTS, 2) is None


def test_equal_counts_give_equal_plans_wherever_they_were_counted():
    n_PE, plan = counts("lognormal_1.5"), LayerPlan(contiguous(16, 4))
    first, second = (calibrate(n_PE.clone(), plan, Balanced(), TOPOLOGY, COSTS, 2) for _ in range(2))
    assert first is not None and first == second


def test_quotas_follow_the_replicas_that_there_are():
    wanted = Wants(((0, 1), (0, 2), (4, 2)), "shares", (5, 7, 11, 1, 1, 1, 3, 13, *[1] * 11))
    plan = LayerPlan(LayerPlacement(contiguous(16, 4).home, 4, ((15, 2),)), (0,) * 17)
    n_PE = torch.zeros(4, 16, dtype=torch.int64)
    n_PE[:, 0], n_PE[:, 4] = 10, 20
    extended = add_missing_copies(n_PE, plan, wanted, TOPOLOGY, COSTS, 2)
    # One more copy fits at position 2: of expert 4, which is hotter.
    assert extended.placement.copies == ((0, 1), (4, 2), (15, 2))
    replicas = zip(extended.placement.replicas, extended.quotas_C, strict=True)
    quotas = {(expert, at): quota for (expert, at, _), quota in replicas}
    assert quotas[0, 0] == 5 + 11 and quotas[0, 1] == 7
    assert quotas[4, 1] == 3 and quotas[4, 2] == 13 and quotas[15, 2] == 0
