"""Stages of sparse collectives: every position gets what the placement says, over as few links as it can."""

import pytest
from hypothesis import given

from moetrain.plan.cost.machine import Topology
from moetrain.plan.placement import LayerPlacement
from moetrain.plan.transfers import STAGES, Transfer, gather_bytes, reduce_bytes, two_level
from tests.support.random_placements import FEW, layers


@FEW
@given(layers())
def test_every_copy_is_brought_once_from_a_position_that_has_it_by_then(layer):
    placement, topology = layer
    for form in STAGES:
        held = {(expert, home) for expert, home in enumerate(placement.home)}
        for stage in STAGES[form](placement, topology):
            assert all((expert, source) in held for expert, source, _ in stage), form
            brought = [(expert, to) for expert, _, to in stage]
            assert len(set(brought)) == len(brought) and not held & set(brought), form
            held |= set(brought)
        assert held == {(expert, at) for expert, at, _ in placement.replicas}, form


@FEW
@given(layers())
def test_an_expert_enters_a_node_once_and_is_passed_on_inside(layer):
    placement, topology = layer
    across, inside = two_level(placement, topology)
    entered = [(expert, topology.node_of(to)) for expert, source, to in across
               if topology.node_of(source) != topology.node_of(to)]
    assert len(set(entered)) == len(entered)
    assert all(topology.node_of(source) == topology.node_of(to) for _, source, to in inside)


def test_leaders_rotate_among_the_positions_that_hold_a_copy():
    everywhere = LayerPlacement((0,) * 6, 6, tuple((expert, at) for expert in range(6) for at in range(1, 6)))
    across, _ = two_level(everywhere, Topology(6, 3))
    assert [to for _, _, to in across if to >= 3] == [3, 4, 5, 3, 4, 5]
    some = LayerPlacement((0, 0), 4, ((0, 3), (1, 3)))
    assert two_level(some, Topology(4, 2)) == ((Transfer(0, 0, 3), Transfer(1, 0, 3)), ())


@pytest.mark.parametrize("positions, per_node", [(8, 8), (8, 2), (8, 4), (9, 4)])
def test_bytes_of_an_expert_that_all_positions_hold(positions, per_node):
    placement = LayerPlacement((0,), positions, tuple((0, at) for at in range(1, positions)))
    topology = Topology(positions, per_node)
    elsewhere = positions - len(topology.positions_of(0))
    packed, levels = (gather_bytes(form, placement, topology, 10) for form in STAGES)
    assert sum(packed.between) == packed.between[0] == 10 * elsewhere
    assert sum(levels.between) == levels.between[0] == 10 * (topology.nodes - 1)
    assert sum(levels.inside) == 10 * (positions - topology.nodes)
    for form in STAGES:
        matrices = gather_bytes(form, placement, topology, 10)
        gradients = reduce_bytes(form, placement, topology, 10)
        assert [sum(part) for part in matrices] == [sum(part) for part in gradients]
        assert gradients.inside[0] == gradients.between[0] == 0                      # the home only receives


@FEW
@given(layers())
def test_two_levels_send_no_more_than_packed_between_nodes_and_the_same_with_one(layer):
    placement, topology = layer
    for formula in (gather_bytes, reduce_bytes):
        packed, levels = (formula(form, placement, topology, 7) for form in STAGES)
        assert sum(map(sum, packed)) == sum(map(sum, levels)) == 7 * len(placement.copies)
        assert sum(levels.between) <= sum(packed.between)
        assert topology.nodes > 1 or packed == levels
