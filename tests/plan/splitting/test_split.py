"""Splits of rows over replicas: the three rules, against the optimum and a plain reading of each rule."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from moetrain.plan.cost.machine import Costs, Topology
from moetrain.plan.cost.step_time import step_time
from moetrain.plan.loads import synthetic as loads
from moetrain.plan.placement import LayerPlacement, contiguous
from moetrain.plan.planners.balanced import Balanced
from moetrain.plan.splitting.split import local_first, shares, waterfill
from moetrain.plan.splitting.water_filling import fill
from tests.support.optimal_split import shortest_time, smallest_largest_load
from tests.support.random_placements import FEW, routed_layers

LINKED = Costs(row_s=1e-6, row_bytes=512.0, expert_bytes=1e6, inside=9e9, between=1e9, latency_s=1e-5,
               hidden_s=1e-3)
FREE = Costs(row_s=1e-6, row_bytes=0.0, expert_bytes=0.0, inside=9e9, between=1e9)
TRACES = Path(__file__).parents[3] / "docs/results/traces"
# Positions, positions of a node, experts.
SHAPES = ((1, 1, 3), (2, 2, 3), (4, 2, 8), (5, 2, 9), (8, 8, 16), (8, 4, 32), (6, 1, 4))


def random_placement(seed: int, positions: int, experts: int) -> LayerPlacement:
    """Any homes, and anything from no copies to an expert everywhere."""
    draw = np.random.default_rng(seed)
    home = draw.integers(0, positions, experts)
    chance_E = draw.choice([0.0, 0.0, 0.3, 1.0], experts)
    copied = np.argwhere(draw.random((experts, positions)) < chance_E[:, None])
    copies = tuple((e, p) for e, p in copied.tolist() if p != home[e])
    return LayerPlacement(tuple(home.tolist()), positions, copies)


def random_counts(seed: int, positions: int, experts: int) -> Tensor:
    """Uneven sources and experts, with some that have nothing."""
    draw = np.random.default_rng([seed, 1])
    size_P = draw.choice([0, 1, 30, 900], positions)
    size_E = np.exp(draw.normal(0, 1.5, experts)) * draw.choice([0, 1], experts, p=[0.2, 0.8])
    return torch.tensor(draw.poisson(size_P[:, None] * size_E / 4)).long()


def cases(seeds: int = 8) -> Iterator[tuple[Tensor, LayerPlacement, Topology]]:
    for positions, per_node, experts in SHAPES:
        for seed in range(seeds):
            yield (random_counts(seed, positions, experts), random_placement(seed, positions, experts),
                   Topology(positions, per_node))


def by_expert(split_PC: Tensor, placement: LayerPlacement) -> Tensor:
    expert_C = torch.tensor([expert for expert, _, _ in placement.replicas])
    rows_PE = torch.zeros(len(split_PC), placement.num_experts, dtype=torch.int64)
    return rows_PE.index_add_(1, expert_C, split_PC)


def loads_of(split_PC: Tensor, placement: LayerPlacement) -> Tensor:
    position_C = torch.tensor([position for _, position, _ in placement.replicas])
    return torch.zeros(placement.positions, dtype=torch.int64).index_add_(0, position_C, split_PC.sum(0))


def quotas_for(placement: LayerPlacement, seed: int) -> Tensor:
    return torch.tensor(np.random.default_rng([seed, 2]).choice([0, 0, 1, 7, 1000], len(placement.replicas)))


# --- every rule


@settings(FEW, max_examples=60)
@given(routed_layers(), st.integers(0, 99))
def test_no_row_is_lost_made_up_or_sent_where_its_expert_is_not(layer, seed):
    n_PE, placement, topology = layer
    for split_PC in (local_first(n_PE, placement, topology), waterfill(n_PE, placement, topology, LINKED),
                     waterfill(n_PE, placement, topology, FREE),
                     shares(n_PE, quotas_for(placement, seed), placement, topology)):
        assert split_PC.dtype == torch.int64 and int(split_PC.min()) >= 0
        assert by_expert(split_PC, placement).equal(n_PE)


def test_without_copies_all_rules_are_expert_parallelism():
    n_PE, topology = random_counts(3, 4, 8), Topology(4, 2)
    homes, no_quotas_E = contiguous(8, 4), torch.zeros(8, dtype=torch.int64)
    for split_PC in (local_first(n_PE, homes, topology), waterfill(n_PE, homes, topology, LINKED),
                     shares(n_PE, no_quotas_E, homes, topology)):
        assert split_PC.equal(n_PE)


@FEW
@given(routed_layers())
def test_a_split_is_the_same_wherever_it_is_computed(layer):
    n_PE, placement, topology = layer
    twin = LayerPlacement(placement.home, placement.positions, placement.copies[::-1])
    strided_PE = n_PE.T.contiguous().T                   # the same numbers in another order of memory
    for costs in (LINKED, FREE):
        assert waterfill(n_PE, placement, topology, costs).equal(waterfill(strided_PE, twin, topology, costs))


# --- local_first


def plain_local_first(rows: int, source: int, expert: int, placement: LayerPlacement,
                      topology: Topology) -> dict[int, int]:
    """Rows by position, from the rule applied to one row at a time."""
    holders = placement.holders(expert)
    on_node = [at for at in holders if topology.node_of(at) == topology.node_of(source)]
    chosen = [source] if source in holders else on_node or list(holders)
    taken = dict.fromkeys(chosen, 0)
    for row in range(rows):
        taken[chosen[(source + expert + row) % len(chosen)]] += 1
    return taken


@FEW
@given(routed_layers())
def test_local_first_is_the_papers_rule(layer):
    n_PE, placement, topology = layer
    n_PE = n_PE % 997                            # fewer rows, since the plain reading takes them one by one
    split_PC = local_first(n_PE, placement, topology).tolist()
    for source, counts_E in enumerate(n_PE.tolist()):
        read = [plain_local_first(rows, source, expert, placement, topology)
                for expert, rows in enumerate(counts_E)]
        assert split_PC[source] == [read[expert].get(at, 0) for expert, at, _ in placement.replicas]


@FEW
@given(routed_layers())
def test_a_source_needs_no_counts_but_its_own(layer):
    n_PE, placement, topology = layer
    whole_PC = local_first(n_PE, placement, topology)
    for source in range(len(n_PE)):
        alone_1C = local_first(n_PE[source:source + 1], placement, topology, first_source=source)
        assert alone_1C.equal(whole_PC[source:source + 1])


def test_sources_do_not_all_send_their_odd_row_to_the_same_copy():
    placement = LayerPlacement((0,), 6, ((0, 1), (0, 2)))
    split_PC = local_first(torch.ones(6, 1, dtype=torch.int64), placement, Topology(6, 3))
    assert split_PC[3:].sum(0).tolist() == [1, 1, 1]


# --- waterfill


@FEW
@given(routed_layers())
def test_waterfill_is_never_worse_than_local_first(layer):
    n_PE, placement, topology = layer
    for costs in (LINKED, FREE, Costs(1e-9, 512.0, 1e6, 9e9, 1e9)):
        ours_PC = waterfill(n_PE, placement, topology, costs)
        papers_PC = local_first(n_PE, placement, topology)
        ours, papers = (step_time(split_PC, placement, topology, costs) for split_PC in (ours_PC, papers_PC))
        assert ours.total_s <= papers.total_s
        assert loads_of(ours_PC, placement).max() <= loads_of(papers_PC, placement).max()


def test_waterfill_is_often_better_than_local_first():
    better = 0
    for n_PE, placement, topology in cases():
        for costs in (LINKED, FREE, Costs(1e-9, 512.0, 1e6, 9e9, 1e9)):
            ours_PC = waterfill(n_PE, placement, topology, costs)
            papers_PC = local_first(n_PE, placement, topology)
            ours, papers = (step_time(split_PC, placement, topology, costs)
                            for split_PC in (ours_PC, papers_PC))
            assert ours.total_s <= papers.total_s
            assert loads_of(ours_PC, placement).max() <= loads_of(papers_PC, placement).max()
            better += ours.total_s < papers.total_s
    assert better > 50


@pytest.mark.parametrize("name", loads.NAMES)
def test_waterfill_is_within_ten_percent_of_the_optimum_when_links_are_free(name):
    for seed, (positions, per_node, experts) in enumerate(((4, 2, 8), (8, 4, 16))):
        n_PE = torch.tensor(loads.generate(name, seed, 1, positions, experts, 500)[0])
        placement = random_placement(seed + 20, positions, experts)
        best = smallest_largest_load(n_PE.sum(0).tolist(), placement)
        split_PC = waterfill(n_PE, placement, Topology(positions, per_node), FREE)
        assert int(loads_of(split_PC, placement).max()) * 10 <= best * 11


@pytest.mark.parametrize("costs", [
    Costs(row_s=200e-6, row_bytes=512.0, expert_bytes=49e3, inside=56e6, between=6.2e6, latency_s=1e-3,
          hidden_s=20e-3),
    Costs(row_s=7e-8, row_bytes=4096.0, expert_bytes=9.4e6, inside=350e9, between=45e9, latency_s=2e-5,
          hidden_s=2e-3),
], ids=["emulated links", "accelerators"])
@pytest.mark.parametrize("name", loads.NAMES)
def test_waterfill_is_within_ten_percent_of_the_optimum_of_the_model(name, costs):
    """On copies that are planned, from other loads, and on any copies."""
    for seed, (positions, per_node, experts) in enumerate(((4, 2, 16), (8, 4, 32))):
        topology = Topology(positions, per_node)
        trace = loads.generate(name, seed, 3, positions, experts, 256)
        expected_E, homes = trace[:2].sum((0, 1)) // 2, contiguous(experts, positions)
        planned = Balanced().plan(expected_E, homes, topology, costs, 2).placement
        for placement in (planned, random_placement(seed + 20, positions, experts)):
            split_PC = waterfill(torch.tensor(trace[2]), placement, topology, costs)
            times = step_time(split_PC, placement, topology, costs)
            optimum_s = shortest_time(trace[2], placement, topology, costs)
            assert times.compute_s + times.link_s <= 1.1 * optimum_s, seed


class Machine(NamedTuple):
    """Nodes, and how far from the optimum the worst modelled time may be."""

    nodes: int
    per_node: int
    worst: float = 1.1


@pytest.mark.parametrize("machine", [Machine(1, 8), Machine(2, 2), Machine(2, 4, worst=1.25)], ids=str)
def test_waterfill_is_near_the_optimum_on_recorded_loads(machine):
    """With free links every largest load is within ten percent of the optimum.

    With links every modeled time is, on one node and on two nodes of two; on two of four their mean is.
    """
    costs = Costs(200e-6, 512.0, 49e3, 56e6, 6.2e6, 1e-3, 20e-3)
    topology = Topology(machine.nodes * machine.per_node, machine.per_node)
    ratios = []
    for name in ("none-32", "micro-32"):
        with np.load(TRACES / f"{name}.npz") as file:
            trace_tPE = file["sources"][-40::5].astype(np.int64).sum(1) // 8             # of all layers
        trace_tPE = trace_tPE.reshape(len(trace_tPE), topology.positions, -1, trace_tPE.shape[2]).sum(2)
        for before_PE, n_PE in zip(trace_tPE, trace_tPE[1:]):
            homes = contiguous(n_PE.shape[1], topology.positions)
            placement = Balanced().plan(before_PE.sum(0), homes, topology, costs, 2).placement
            largest = int(loads_of(waterfill(torch.tensor(n_PE), placement, topology, FREE), placement).max())
            assert largest * 10 <= smallest_largest_load(n_PE.sum(0).tolist(), placement) * 11
            split_PC = waterfill(torch.tensor(n_PE), placement, topology, costs)
            times = step_time(split_PC, placement, topology, costs)
            ratios.append((times.compute_s + times.link_s) / shortest_time(n_PE, placement, topology, costs))
    assert max(ratios) <= machine.worst and sum(ratios) / len(ratios) <= 1.1, ratios


def test_no_position_sends_or_takes_in_all_that_leaves_a_node():
    """Expert 0 is hot at its home on the first node; copies on the second take what that node cannot."""
    placement = LayerPlacement((0, 1, 2, 3), 4, ((0, 2), (0, 3)))
    n_PE = torch.tensor([[600, 0, 0, 0], [600, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    split_PC = waterfill(n_PE, placement, Topology(4, 2), FREE)
    away_P, taken_P = split_PC[:2, 1:3].sum(1), split_PC[:2, 1:3].sum(0)
    assert split_PC.sum(0).tolist() == [400, 400, 400, 0, 0, 0]
    assert away_P.tolist() == [400, 400] == taken_P.tolist()


def test_levelling_passes_rows_on_from_copy_to_copy():
    """Position 0 is relieved only if expert 1 makes room at position 1 first."""
    placement = LayerPlacement((0, 1, 2), 4, ((0, 1), (1, 2), (2, 3)))
    n_PE = torch.tensor([[80, 0, 0], [0, 80, 0], [0, 0, 80], [0, 0, 0]])
    split_PC = waterfill(n_PE, placement, Topology(4, 4), FREE)
    assert smallest_largest_load([80, 80, 80], placement) == 60
    assert int(loads_of(split_PC, placement).max()) <= 62


def test_rows_leave_their_node_only_while_that_pays():
    """One hot expert, its copies on both nodes; all rows come from the first."""
    placement = LayerPlacement((0, 2), 4, ((0, 1), (0, 2), (0, 3)))
    n_PE = torch.tensor([[400, 0], [400, 0], [0, 0], [0, 0]])
    topology = Topology(4, 2)
    crossing = {}
    for row_bytes in (0.0, 1e3, 1e6):
        split_PC = waterfill(n_PE, placement, topology, Costs(1e-6, row_bytes, 0.0, 9e9, 1e9))
        crossing[row_bytes] = int(split_PC[:, [2, 3]].sum())
    assert crossing == {0.0: 400, 1e3: 0, 1e6: 0}
    assert int(waterfill(n_PE, placement, topology, Costs(1e-6, 1.0, 0.0, 9e9, 1e9))[:, [2, 3]].sum()) == 400


def test_rows_with_a_replica_at_home_stay_when_loads_allow():
    placement = LayerPlacement((0, 1), 2, ((0, 1), (1, 0)))
    n_PE = torch.tensor([[70, 30], [30, 70]])
    split_PC = waterfill(n_PE, placement, Topology(2, 2), LINKED)
    assert step_time(split_PC, placement, Topology(2, 2), LINKED).link_s == 4 * LINKED.latency_s


@pytest.mark.parametrize(("rows", "bases", "added"), [
    (0, [3, 1], [0, 0]), (2, [3, 1], [0, 2]), (5, [3, 1], [1, 4]), (4, [0, 0, 0], [2, 1, 1]), (3, [9], [3]),
    (1, [5, 5], [1, 0]),
])
def test_fill_raises_the_lowest(rows, bases, added):
    assert fill(rows, bases) == added


@settings(FEW, max_examples=200)
@given(st.integers(0, 400), st.lists(st.integers(0, 90), min_size=1, max_size=7))
def test_fill_leaves_no_base_lower_than_one_that_was_raised(rows, bases):
    added = fill(rows, bases)
    assert sum(added) == rows and min(added) >= 0
    surface = [base + more for base, more in zip(bases, added)]
    raised = [height for height, more in zip(surface, added) if more]
    assert not raised or max(raised) - min(surface) <= 1


# --- shares


def test_shares_cut_rows_by_their_global_offset():
    placement = LayerPlacement((0, 1), 3, ((0, 1), (0, 2)))
    n_PE = torch.tensor([[4, 1], [4, 1], [4, 1]])
    split_PC = shares(n_PE, torch.tensor([50, 25, 25, 9]), placement, Topology(3, 3))
    assert split_PC.tolist() == [[4, 0, 0, 1], [2, 2, 0, 1], [0, 1, 3, 1]]


@FEW
@given(routed_layers(), st.integers(0, 99))
def test_shares_follow_quotas_to_the_row(layer, seed):
    n_PE, placement, topology = layer
    quotas_C = quotas_for(placement, seed)
    sent_C = shares(n_PE, quotas_C, placement, topology).sum(0).tolist()
    for c, (expert, at, _) in enumerate(placement.replicas):
        mine = [i for i, replica in enumerate(placement.replicas) if replica[0] == expert]
        planned, rows = int(quotas_C[mine].sum()), int(n_PE[:, expert].sum())
        wanted = rows * int(quotas_C[c]) / planned if planned else rows * (at == placement.home[expert])
        assert abs(sent_C[c] - wanted) < 1


# --- the model


def test_the_model_on_a_case_computed_by_hand():
    placement = LayerPlacement((0, 2), 4, ((0, 1), (0, 3)))
    topology, costs = Topology(4, 2), Costs(0.5, 10.0, 100.0, 20.0, 5.0, 1.0, 8.0)
    # Replicas (0,0) (0,1) (0,3) (1,2).
    split_PC = torch.tensor([[3, 4, 0, 1], [0, 2, 0, 0], [0, 0, 6, 5], [1, 0, 0, 0]])
    times = step_time(split_PC, placement, topology, costs)
    assert times.compute_s == 0.5 * 6                           # positions get 4, 6, 6, 6
    # inside 0->1: 4, 2->3: 6; between 0->2: 1, 3->0: 1
    assert times.link_s == 4 * (1.0 + max(6 * 10 / 20, 1 * 10 / 5))
    # One copy inside the node (5 s), one between (20 s), each by its own link, and a message (1 s): 21 s.
    # Of it 8 s are hidden in forward and 16 s in backward.
    assert times.copy_s == (21 - 8) + (21 - 16)
    assert times.total_s == times.compute_s + times.link_s + times.copy_s


def test_copies_that_hide_cost_nothing_and_none_costs_no_message():
    n_PE = torch.tensor([[5, 5], [5, 5]])
    costs = Costs(1.0, 1.0, 10.0, 10.0, 10.0, latency_s=0.5, hidden_s=1.5)
    placement = LayerPlacement((0, 1), 2, ((0, 1),))
    split_PC = local_first(n_PE, placement, Topology(2, 2))
    assert step_time(split_PC, placement, Topology(2, 2), costs).copy_s == 0
    bare = Costs(1.0, 1.0, 10.0, 10.0, 10.0, latency_s=0.5)
    assert step_time(n_PE, contiguous(2, 2), Topology(2, 2), bare).copy_s == 0
