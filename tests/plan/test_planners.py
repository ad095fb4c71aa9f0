"""Planners: plans are legal and repeatable, rivals plan as published, and ours does what it promises.

The golden plans in tests/plan/golden were computed by running the code named there on ten load vectors each.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from moetrain.plan.cost.machine import Costs, Topology
from moetrain.plan.cost.step_time import step_time
from moetrain.plan.leveling.locality import NodeFlows, add_local_copies
from moetrain.plan.leveling.overflow import LoadSnapshot, OverflowState, overlaps
from moetrain.plan.loads.synthetic import NAMES, generate
from moetrain.plan.placement import ExpertPlacement, LayerPlacement, contiguous
from moetrain.plan.planners import eplb, laer, llep, shadow
from moetrain.plan.planners.balanced import Balanced
from moetrain.plan.planners.base import (
    SupportsRehoming,
    copies_per_position,
    loads_by_node,
    max_hidden_copies,
)
from moetrain.plan.planners.ep import ExpertParallel
from moetrain.plan.planners.hecate import Hecate
from moetrain.plan.splitting.split import local_first, shares, waterfill
from tests.support.random_placements import FEW, routed_layers

PLANNERS = [ExpertParallel(), Hecate(), eplb.Eplb(), eplb.Eplb(groups=8), shadow.Shadow(),
            llep.LeastLoaded(min_rows=8),
            laer.Laer(), Balanced(), Balanced(tolerance=0.0, min_gain=0.0)]
NAMED = {type(planner).__name__ + str(i): planner for i, planner in enumerate(PLANNERS)}
# A balanced layer computes for 1 s here: weights cross in 0.05 s, half the rows (between nodes) in 0.3 s.
ROWS = 1024
CHEAP = Costs(1 / ROWS, 0.3 * 1e9 / (4 * ROWS * 0.5), 0.05e9, 9e9, 1e9, hidden_s=0.3)
BARE = Costs(1 / ROWS, 0.3 * 1e9 / (4 * ROWS * 0.5), 0.05e9, 9e9, 1e9)
# Positions, positions of a node, experts.
SHAPES = ((1, 1, 4), (2, 2, 3), (4, 2, 8), (5, 2, 10), (8, 8, 64), (8, 4, 16), (16, 4, 8))


def golden(name: str) -> list[dict]:
    return json.loads((Path(__file__).parent / "golden" / f"{name}.json").read_text())["cases"]


def homes_for(seed: int, positions: int, experts: int) -> LayerPlacement:
    """Equal blocks, or anything."""
    if seed % 2 and experts % positions == 0:
        return contiguous(experts, positions)
    home = np.random.default_rng(seed).integers(0, positions, experts)
    return LayerPlacement(tuple(home.tolist()), positions)


def node_loads(n_PE: np.ndarray, topology: Topology) -> np.ndarray:
    return np.stack([n_PE[list(topology.positions_of(node))].sum(0) for node in range(topology.nodes)])


def split(planner, plan, n_PE: np.ndarray, topology: Topology, costs: Costs) -> torch.Tensor:
    counts_PE = torch.tensor(n_PE)
    match planner.rule:
        case "local_first":
            return local_first(counts_PE, plan.placement, topology)
        case "waterfill":
            return waterfill(counts_PE, plan.placement, topology, costs)
    return shares(counts_PE, torch.tensor(plan.quotas_C), plan.placement, topology)


def seconds(planner, homes, n_PE, topology, costs, max_copies: int) -> float:
    plan = planner.plan(node_loads(n_PE, topology), homes, topology, costs, max_copies)
    return step_time(split(planner, plan, n_PE, topology, costs), plan.placement, topology, costs).total_s


# --- every planner


@pytest.mark.parametrize("planner", NAMED.values(), ids=NAMED)
def test_plans_are_legal(planner):
    copied = 0
    for seed, (positions, per_node, experts) in enumerate(SHAPES):
        topology, homes = Topology(positions, per_node), homes_for(seed, positions, experts)
        for name in ("lognormal_1.5", "hot_rank", "empty"):
            n_PE = generate(name, seed, 1, positions, experts, 200)[0]
            for max_copies, costs in ((0, CHEAP), (1, CHEAP), (3, CHEAP), (2, BARE)):
                for loads in (n_PE.sum(0), node_loads(n_PE, topology)):
                    plan = planner.plan(loads, homes, topology, costs, max_copies)
                    assert plan.placement.home == homes.home and plan.placement.positions == positions
                    assert all(len(plan.placement.copies_at(at)) <= max_copies for at in range(positions))
                    assert (plan.quotas_C is not None) == (planner.rule == "shares")
                    if plan.quotas_C is not None:
                        assert sum(plan.quotas_C) == n_PE.sum() and min(plan.quotas_C) >= 0
                    assert int(split(planner, plan, n_PE, topology, costs).sum()) == n_PE.sum()
                    copied += len(plan.placement.copies)
    assert (copied > 0) == (not isinstance(planner, ExpertParallel))


@pytest.mark.parametrize("planner", NAMED.values(), ids=NAMED)
def test_equal_loads_give_equal_plans(planner):
    topology, homes = Topology(8, 4), contiguous(32, 8)
    for name in ("lognormal_1", "hot_expert"):
        loads = node_loads(generate(name, 1, 1, 8, 32, 500)[0], topology)
        plans = [planner.plan(same, homes, topology, CHEAP, 3) for same in (
            loads, loads.copy(order="F"), loads.astype(np.int32), np.repeat(loads, 2, axis=1)[:, ::2])]
        assert all(plan == plans[0] for plan in plans)
        digests = {ExpertPlacement((("layer", plan.placement),)).digest for plan in plans}
        assert len(digests) == 1


@pytest.mark.parametrize("planner", NAMED.values(), ids=NAMED)
def test_no_rows_at_all_are_no_trouble(planner):
    plan = planner.plan(np.zeros((2, 8), dtype=np.int64), contiguous(8, 4), Topology(4, 2), CHEAP, 2)
    assert split(planner, plan, np.zeros((4, 8), dtype=np.int64), Topology(4, 2), CHEAP).sum() == 0


@pytest.mark.parametrize("planner",
                         [planner for planner in PLANNERS if isinstance(planner, SupportsRehoming)],
                         ids=lambda planner: type(planner).__name__)
@settings(FEW, max_examples=6)
@given(st.sampled_from([Topology(2, 1), Topology(4, 2), Topology(8, 4)]),
       st.lists(st.sampled_from([8, 16, 24]), min_size=1, max_size=4),
       st.sampled_from(["lognormal_1.5", "hot_rank"]), st.integers(0, 99))
def test_moved_homes_are_as_many_everywhere(planner, topology, experts, name, seed):
    placement = ExpertPlacement(tuple((f"layers.{i}", contiguous(size, topology.positions))
                                      for i, size in enumerate(experts)))
    loads = {router: generate(name, seed + i, 1, topology.positions, layer.num_experts, 400)[0].sum(0)
             for i, (router, layer) in enumerate(placement.layers)}
    moved = planner.rehome(loads, placement, topology, dict.fromkeys(loads, CHEAP))
    assert [router for router, _ in moved.layers] == [router for router, _ in placement.layers]
    assert all(not layer.copies for _, layer in moved.layers)
    counts = [sum(len(layer.experts_of(at)) for _, layer in moved.layers) for at in range(topology.positions)]
    assert max(counts) == min(counts) and sum(counts) == sum(experts)
    assert moved.digest == planner.rehome(loads, placement, topology, dict.fromkeys(loads, CHEAP)).digest


def test_what_fits_behind_other_work_is_counted_in_whole_experts():
    assert max_hidden_copies(Topology(8, 4), CHEAP, 64) == 6                      # 0.3 s at 1e9 between nodes
    assert max_hidden_copies(Topology(8, 8), CHEAP, 64) == 54                         # and at 9e9 inside
    assert max_hidden_copies(Topology(8, 8), CHEAP, 32) == 32
    assert max_hidden_copies(Topology(8, 4), BARE, 64) == 0
    assert max_hidden_copies(Topology(8, 4), Costs(1.0, 1.0, 0.0, 1.0, 1.0), 64) == 64
    assert max_hidden_copies(Topology(8, 4), Costs(1.0, 1.0, 1.0, float("inf"), float("inf")), 64) == 64
    assert copies_per_position(4, Topology(8, 4), CHEAP, 64) == 4
    assert copies_per_position(9, Topology(8, 4), CHEAP, 64) == 6


def test_loads_without_nodes_are_divided_by_their_sizes():
    loads_NE = loads_by_node(np.array([10, 7]), Topology(5, 2))
    assert loads_NE.sum(0).tolist() == [10, 7] and loads_NE[:, 0].tolist() == [4, 4, 2]


# --- as their authors have it


@pytest.mark.parametrize("case", golden("eplb"), ids=str)
def test_eplb_places_as_published(case):
    sizes = (case[name] for name in ("slots", "groups", "nodes", "positions"))
    assert eplb.rebalance(np.array(case["loads"]), *sizes) == case["held"]


@pytest.mark.parametrize("case", golden("llep"), ids=str)
def test_llep_cuts_as_published(case):
    homes = contiguous(len(case["loads"]), case["positions"])
    assignments = llep.spill(np.array(case["loads"]), homes, case["capacity"], case["min_rows"],
                             max_copies=len(case["loads"]))
    assert [list(piece) for piece in assignments] == case["pieces"]


@pytest.mark.parametrize("case", golden("shadow"), ids=str)
def test_shadow_chooses_as_published(case):
    chosen = shadow.choose_shadowed(np.array(case["loads"]), case["row_s"], case["send_row_s"],
                                    case["send_expert_s"])
    assert sorted(chosen) == case["shadowed"]


@pytest.mark.parametrize("case", golden("laer"), ids=str)
def test_laer_counts_and_places_as_published(case):
    half = np.array(case["loads"]) // 2
    loads_NE, slots_P, topology = np.stack([half, half]), np.full(16, case["each"]), Topology(16, 8)
    costs = Costs(case["row_s"], case["row_bytes"], 0.0, case["inside"], case["between"])
    counts_E = laer.queued_counts(loads_NE.sum(0), int(slots_P.sum()), 2)
    queued_EP = laer.place_replicas(counts_E, loads_NE.sum(0), slots_P, topology, None)
    best_EP = laer.best_replicas(loads_NE, slots_P, topology, costs)
    for held_EP, held in ((queued_EP, case["queued"]), (best_EP, case["held"])):
        assert [np.repeat(np.arange(16), held_P).tolist() for held_P in held_EP.T] == held


def read_hecate(loads: list[int], homes: LayerPlacement, topology: Topology, t: int,
                m: int) -> set[tuple[int, int]]:
    """Algorithm 1 as section 3.1 of its description has it, with sets and loops."""
    hottest = sorted(range(len(loads)), key=lambda e: (-loads[e], e))[:t]
    where = {e: {homes.home[e]} for e in range(len(loads))}
    if t <= m:
        everywhere = {(e, at) for e in hottest for at in range(homes.positions)}
        return everywhere - {(e, homes.home[e]) for e in hottest}
    slots = dict.fromkeys(hottest, 1)
    for _ in range(homes.positions * m):
        growing = [e for e in hottest if slots[e] < homes.positions]
        if growing:
            slots[max(growing, key=lambda e: (loads[e] / slots[e], -e))] += 1
    free = [m] * homes.positions
    copies = set()
    for e in hottest:
        for _ in range(slots[e] - 1):
            able = [at for at in range(homes.positions) if free[at] and at not in where[e]]
            if not able:
                break
            def rank(at: int) -> tuple:
                members = topology.positions_of(topology.node_of(at))
                return (any(other in where[e] for other in members), -sum(free[other] for other in members),
                        topology.node_of(at), -free[at], at)
            chosen = min(able, key=rank)
            where[e].add(chosen)
            free[chosen] -= 1
            copies.add((e, chosen))
    return copies


@pytest.mark.parametrize("name", NAMES)
def test_hecate_copies_as_its_algorithm_reads(name):
    for seed, (positions, per_node, experts) in enumerate(((4, 2, 8), (8, 4, 32), (6, 4, 12))):
        topology, homes = Topology(positions, per_node), homes_for(seed, positions, experts)
        loads_E = generate(name, seed, 1, positions, experts, 300)[0].sum(0)
        for max_copies in (1, 2, 20):
            plan = Hecate().plan(loads_E, homes, topology, CHEAP, max_copies)
            t = max_hidden_copies(topology, CHEAP, experts)
            read = read_hecate(loads_E.tolist(), homes, topology, t, min(max_copies, t))
            assert set(plan.placement.copies) == read


def test_hecates_homes_balance_what_cannot_be_copied():
    """Two layers over two positions, one hot expert each (t = 1): cool ones spread by load, hot ones fill."""
    costs = Costs(1.0, 1.0, 1.0, 1.0, 1.0, hidden_s=1.0)
    placement = ExpertPlacement((("a", contiguous(4, 2)), ("b", contiguous(4, 2))))
    loads = {"a": np.array([90, 9, 1, 1]), "b": np.array([5, 60, 6, 7])}
    moved = Hecate().rehome(loads, placement, Topology(2, 2), dict.fromkeys(loads, costs))
    assert moved["a"].home[1:] == (0, 1, 1)
    rest = {at: sum(load for load, home in zip([5, 0, 6, 7], moved["b"].home, strict=True) if home == at)
            for at in (0, 1)}
    assert sorted(rest.values()) == [7, 11]


def test_shadowing_stops_where_sending_costs_more_than_it_saves():
    assert shadow.choose_shadowed(np.array([100, 50, 40, 10]), 1.0, 0.0, 20.0) == [0]
    assert shadow.choose_shadowed(np.array([100, 50, 40, 10]), 1.0, 0.0, 5.0) == [0, 1, 2]
    assert shadow.choose_shadowed(np.array([100, 50, 40, 10]), 1.0, 0.0, 60.0) == []


def test_llep_does_nothing_below_its_threshold_and_heeds_room():
    loads_E, homes, topology = np.array([120, 100, 90, 90]), contiguous(4, 4), Topology(4, 4)
    assert llep.LeastLoaded(min_rows=1).plan(loads_E, homes, topology, CHEAP, 4).placement.copies == ()
    eager = llep.LeastLoaded(min_rows=1, threshold=1.0, capacity=1.0).plan(loads_E, homes, topology, CHEAP, 4)
    assert eager.placement.copies == ((0, 2), (0, 3)) and eager.quotas_C == (100, 10, 10, 100, 90, 90)
    without_room = llep.LeastLoaded(min_rows=1, threshold=1.0).plan(loads_E, homes, topology, CHEAP, 0)
    assert without_room.quotas_C == (120, 100, 90, 90)


# --- ours


def test_intervals_overlap_group_by_group():
    item, receiver, rows = overlaps(rows_I=np.array([5, 2, 4]), group_I=np.array([0, 0, 1]),
                                    gap_R=np.array([3, 1, 6]), group_R=np.array([0, 0, 1]))
    found = zip(item.tolist(), receiver.tolist(), rows.tolist(), strict=True)
    assert list(found) == [(0, 0, 3), (0, 1, 1), (2, 2, 4)]


@FEW
@given(routed_layers(), st.integers(1, 3), st.booleans(), st.booleans())
def test_moved_overflow_loses_no_rows_and_stays_below_the_level(layer, max_copies, whole, on_source_nodes):
    n_PE, placement, topology = layer
    home_E, loads_NE = np.array(placement.home), node_loads(n_PE.numpy(), topology)
    snapshot, level = LoadSnapshot(loads_NE, home_E, topology), -(-int(n_PE.sum()) // topology.positions)
    state = OverflowState(snapshot, level, max_copies).place_overflow(
        on_source_nodes=on_source_nodes, whole=whole)
    for moved in (state, add_local_copies(state, NodeFlows(snapshot, max_copies), budget=2 * max_copies)):
        plan = moved.result()
        assert int(plan.kept_E.min()) >= 0 and (plan.rows_X >= (1 if moved is state else 0)).all()
        rows_E = plan.kept_E.copy()
        np.add.at(rows_E, plan.expert_X, plan.rows_X)
        assert rows_E.tolist() == n_PE.sum(0).tolist()
        load_P = np.zeros(topology.positions, dtype=np.int64)
        np.add.at(load_P, np.r_[home_E, plan.position_X], np.r_[plan.kept_E, plan.rows_X])
        assert load_P.tolist() == moved.load_P.tolist()
        assert np.bincount(plan.position_X, minlength=topology.positions).max() <= max_copies
    before_P = np.zeros(topology.positions, dtype=np.int64)
    np.add.at(before_P, home_E, n_PE.sum(0).numpy())
    assert (state.load_P <= np.maximum(before_P, level)).all()


@pytest.mark.parametrize(("positions", "per_node"), [(4, 2), (8, 4), (8, 8)])
def test_ours_levels_a_hot_rank_with_few_copies(positions, per_node):
    topology, homes = Topology(positions, per_node), contiguous(4 * positions, positions)
    n_PE = generate("hot_rank", 0, 1, positions, 4 * positions, ROWS)[0]
    costs = Costs(1 / ROWS, 0.0, 0.01e9, 9e9, 1e9, hidden_s=0.3)
    plan = Balanced().plan(node_loads(n_PE, topology), homes, topology, costs, 3)
    split_PC = waterfill(torch.tensor(n_PE), plan.placement, topology, costs)
    mean = n_PE.sum() / positions
    assert step_time(split_PC, plan.placement, topology, costs).compute_s * ROWS <= 1.1 * mean
    assert len(plan.placement.copies) <= 2 * positions


def test_ours_does_nothing_at_balance_or_where_it_does_not_pay():
    topology, homes = Topology(8, 4), contiguous(64, 8)
    even = generate("balanced", 0, 1, 8, 64, 20000)[0]
    assert Balanced().plan(node_loads(even, topology), homes, topology, CHEAP, 4).placement.copies == ()
    hot = node_loads(generate("hot_rank", 0, 1, 8, 64, ROWS)[0], topology)
    dear = Costs(1 / ROWS, 1.0, 1e12, 9e9, 1e9)
    assert Balanced().plan(hot, homes, topology, dear, 4).placement.copies == ()
    assert Balanced(min_gain=0.9).plan(hot, homes, topology, CHEAP, 4).placement.copies == ()
    assert Balanced().plan(hot, homes, topology, CHEAP, 4).placement.copies != ()


def test_ours_keeps_rows_on_their_node_where_copies_hide():
    """Each node asks for the experts of the other. Loads are a little uneven, so that a plan is needed."""
    topology, homes = Topology(4, 2), contiguous(4, 4)
    loads_NE = np.array([[0, 0, 1100, 900], [900, 900, 0, 0]])
    plan = Balanced().plan(loads_NE, homes, topology, Costs(1e-3, 1e6, 1e6, 9e9, 1e9, hidden_s=1.0), 2)
    held = {(expert, topology.node_of(at)) for expert, at, _ in plan.placement.replicas}
    assert {(2, 0), (3, 0), (0, 1), (1, 1)} <= held


SLOW_LINKS = Costs(1 / ROWS, 1e9 / (4 * ROWS * 0.5), 0.05e9, 9e9, 1e9, hidden_s=0.3)


@pytest.mark.parametrize("costs", [CHEAP, BARE, SLOW_LINKS],
                         ids=["hidden", "exposed", "slow links"])
def test_no_rival_is_ahead_of_ours_over_the_family(costs):
    """Geometric mean of the modelled time over all cases, with the loads known; the same room for all."""
    rivals = {"ours": Balanced(), "ep": ExpertParallel(), "hecate": Hecate(), "eplb": eplb.Eplb(),
              "shadow": shadow.Shadow(),
              "llep": llep.LeastLoaded(min_rows=32), "laer": laer.Laer()}
    logs = dict.fromkeys(rivals, 0.0)
    topology, homes = Topology(8, 4), contiguous(32, 8)
    for name in NAMES:
        n_PE = generate(name, 5, 1, 8, 32, ROWS)[0]
        for rival, planner in rivals.items():
            logs[rival] += np.log(seconds(planner, homes, n_PE, topology, costs, 4))
    assert min(logs, key=logs.__getitem__) == "ours", logs


def test_ours_splits_better_than_llep_on_its_own_copies():
    topology, homes = Topology(8, 4), contiguous(32, 8)
    for name in NAMES:
        n_PE = generate(name, 2, 1, 8, 32, ROWS)[0]
        planner = llep.LeastLoaded(min_rows=32)
        plan = planner.plan(n_PE.sum(0), homes, topology, CHEAP, 4)
        theirs = step_time(split(planner, plan, n_PE, topology, CHEAP), plan.placement, topology, CHEAP)
        ours_PC = waterfill(torch.tensor(n_PE), plan.placement, topology, CHEAP)
        ours = step_time(ours_PC, plan.placement, topology, CHEAP)
        assert ours.total_s <= theirs.total_s * 1.001, name


def everybodys_expert(positions: int) -> np.ndarray:
    """One expert has half of all rows, the others share the rest."""
    loads_E = np.full(4 * positions, 100)
    loads_E[5] = loads_E.sum()
    return loads_E


def test_experts_are_sliced_where_their_copies_are_late_and_only_there():
    topology, homes, loads_E = Topology(8, 8), contiguous(32, 8), everybodys_expert(8)
    late = Costs(1 / ROWS, 0.0, expert_bytes=0.05e9, inside=1e9, between=1e9)    # 50 ms a copy, from one home
    planner = Balanced()
    assert planner.choose_sliced(loads_E, homes, topology, late, 2, 0) == ()
    cut = planner.choose_sliced(loads_E, homes, topology, late, 2, 4)
    assert 5 in cut
    layers = homes.with_sliced(cut), homes
    sliced, whole = (planner.plan(loads_E, layer, topology, late, 2) for layer in layers)
    took = [planner._plan_and_time(loads_E, layer, topology, late, 2)[1] for layer in layers]
    assert took[0] < took[1] and len(sliced.placement.copies) >= len(whole.placement.copies)
    hidden = replace(late, hidden_s=1.0)
    assert planner.choose_sliced(loads_E, homes, topology, hidden, 2, 4) == ()
    assert Balanced(horizon=0).choose_sliced(loads_E, homes, topology, late, 2, 4) == ()
    assert planner.choose_sliced(np.full(32, 100), homes, topology, late, 2, 4) == ()
    even_E = np.full(32, 100)                                            # its experts are put together again
    assert planner.choose_sliced(even_E, homes.with_sliced((5,)), topology, late, 2, 4) == ()
    patient = Balanced(horizon=0)
    assert patient.choose_sliced(loads_E, homes.with_sliced((5, 7)), topology, late, 2, 4) == (5, 7)


def test_homes_move_only_where_that_pays():
    topology, layers = Topology(8, 4), 3
    placement = ExpertPlacement(tuple((f"layers.{i}", contiguous(32, 8)) for i in range(layers)))
    hot = {f"layers.{i}": generate("hot_rank", i, 1, 8, 32, ROWS)[0] for i in range(layers)}
    loads = {router: n_PE.sum(0) for router, n_PE in hot.items()}
    assert Balanced(horizon=0).rehome(loads, placement, topology, dict.fromkeys(loads, BARE)) == placement
    costs = dict.fromkeys(loads, BARE)
    assert Balanced(state_ratio=1e9).rehome(loads, placement, topology, costs) == placement
    even = {router: np.full(32, 256) for router in loads}
    assert Balanced().rehome(even, placement, topology, dict.fromkeys(even, BARE)) == placement
    planner = Balanced(horizon=100)
    moved = planner.rehome(loads, placement, topology, dict.fromkeys(loads, BARE))
    changed = sum(a != b for (_, was), (_, now) in zip(placement.layers, moved.layers, strict=True)
                  for a, b in zip(was.home, now.home, strict=True))
    before, after = (sum(seconds(planner, homes[router], n_PE, topology, BARE, 4)
                         for router, n_PE in hot.items())
                     for homes in (placement, moved))
    cost = changed * planner.state_ratio * BARE.expert_bytes / BARE.between
    assert 0 < changed and 100 * (before - after) > cost
