"""Properties of every planner on inputs of any kind, degenerate ones included.

Those are no rows, no room, no time, one position, sliced experts. Plans are legal, rows are neither lost nor
invented, and nothing divides by zero: numpy's warnings are errors here.
"""

import math
import warnings

import numpy as np
import torch
from hypothesis import given, settings, strategies as st

from moetrain.plan.calibration import calibrate
from moetrain.plan.cost.machine import Costs, Topology
from moetrain.plan.cost.step_time import step_time
from moetrain.plan.placement import ExpertPlacement, LayerPlacement
from moetrain.plan.planners.balanced import Balanced
from moetrain.plan.planners.base import LayerPlan, Planner, SupportsRehoming, SupportsSlicing, loads_by_node
from moetrain.plan.planners.ep import ExpertParallel
from moetrain.plan.planners.eplb import Eplb
from moetrain.plan.planners.hecate import Hecate
from moetrain.plan.planners.laer import Laer
from moetrain.plan.planners.llep import LeastLoaded
from moetrain.plan.planners.shadow import Shadow
from moetrain.plan.splitting.rules import rule_of

PLANNERS = [ExpertParallel(), Hecate(), Eplb(), Shadow(),
            LeastLoaded(min_rows=1, threshold=1.0, capacity=1.0), Laer(),
            Balanced(tolerance=0.0, min_gain=0.0)]
RATES = st.sampled_from([1e9, math.inf])


@st.composite
def situations(draw: st.DrawFn) -> tuple[np.ndarray, LayerPlacement, Topology, Costs, int]:
    """Rows of every position for every expert, homes, and what planners are told besides."""
    positions, experts = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    per_position = st.lists(st.sampled_from([0, 0, 1, 3, 500, 10**6]), min_size=experts, max_size=experts)
    n_PE = np.array(draw(st.lists(per_position, min_size=positions, max_size=positions)), dtype=np.int64)
    home = draw(st.lists(st.integers(0, positions - 1), min_size=experts, max_size=experts))
    sliced = draw(st.one_of(st.just(range(experts)), st.sets(st.integers(0, experts - 1))))
    costs = Costs(draw(st.sampled_from([0.0, 1e-6])), draw(st.sampled_from([0.0, 4e3])),
                  draw(st.sampled_from([0.0, 1e6])),
                  draw(RATES), draw(RATES), hidden_s=draw(st.sampled_from([0.0, 1.5e-3, math.inf])),
                  collective=draw(st.sampled_from(["packed", "two_level"])))
    topology = Topology(positions, draw(st.integers(1, 5)))
    homes = LayerPlacement(tuple(home), positions, sliced=tuple(sliced))
    return n_PE, homes, topology, costs, draw(st.integers(0, 3))


@settings(max_examples=40, derandomize=True, database=None, deadline=None)
@given(situations(), st.booleans())
def test_plans_are_legal_whatever_the_loads_homes_and_budgets(situation, nodes_known):
    n_PE, homes, topology, costs, max_copies = situation
    node_P = np.arange(topology.positions) // topology.per_node
    loads_NE = np.stack([n_PE[node_P == node].sum(0) for node in range(topology.nodes)])
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        assert loads_by_node(n_PE.sum(0), topology).sum(0).tolist() == n_PE.sum(0).tolist()
        for planner in PLANNERS:
            plan = planner.plan(loads_NE if nodes_known else n_PE.sum(0), homes, topology, costs, max_copies)
            check(planner, plan, n_PE, homes, topology, costs, max_copies)
            check_homes(planner, n_PE.sum(0), homes, topology, costs, max_copies)


def check(planner: Planner, plan: LayerPlan, n_PE: np.ndarray, homes: LayerPlacement, topology: Topology,
          costs: Costs, max_copies: int) -> None:
    placement = plan.placement.with_sliced(homes.sliced)
    assert placement.home == homes.home
    copies = np.bincount([at for _, at in placement.copies], minlength=topology.positions)
    assert copies.max() <= max_copies, (planner, placement)
    split_PC = rule_of(planner.rule, plan, topology, costs).split(torch.from_numpy(n_PE), plan.placement, 0)
    of_expert_PE = torch.zeros(n_PE.shape, dtype=torch.int64).index_add_(
        1, torch.tensor([expert for expert, _, _ in plan.placement.replicas]), split_PC)
    assert split_PC.min() >= 0 and np.array_equal(of_expert_PE.numpy(), n_PE), planner
    assert not any(math.isnan(seconds) for seconds in step_time(split_PC, placement, topology, costs))
    if max_copies:
        more = calibrate(torch.from_numpy(n_PE), plan, planner, topology, costs, max_copies)
        assert more is None or set(more.placement.copies) > set(plan.placement.copies)


def check_homes(planner: Planner, loads_E: np.ndarray, homes: LayerPlacement, topology: Topology,
                costs: Costs, max_copies: int) -> None:
    if isinstance(planner, SupportsRehoming):
        placement = ExpertPlacement((("layer", homes.whole),))
        moved = planner.rehome({"layer": loads_E}, placement, topology, {"layer": costs})["layer"]
        assert not moved.copies and moved.num_experts == homes.num_experts
    if isinstance(planner, SupportsSlicing):
        assert len(planner.choose_sliced(loads_E, homes, topology, costs, max_copies, 2)) <= 2
