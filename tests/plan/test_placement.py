"""Placements of experts: every expert has one home, and every replica one physical slot."""

import pytest
from hypothesis import given, strategies as st

from moetrain.plan.placement import ExpertPlacement, LayerPlacement, contiguous, slice_columns, slice_rows
from tests.support.random_placements import FEW, layers


@FEW
@given(layers(sliced=True))
def test_positions_share_the_whole_experts_without_overlap(layer):
    placement, _ = layer
    held = [placement.experts_of(position) for position in range(placement.positions)]
    assert sorted(sum(held, placement.sliced)) == list(range(placement.num_experts))
    assert all(list(experts) == sorted(experts) for experts in held)


@FEW
@given(layers(sliced=True))
def test_a_physical_slot_names_the_position_and_the_place_in_its_bank(layer):
    placement, _ = layer
    assert len({physical for *_, physical in placement.replicas}) == len(placement.replicas)
    for expert, position, physical in placement.replicas:
        assert divmod(physical, placement.slots_per_position)[0] == position
        assert placement.slots_of(position)[physical % placement.slots_per_position] == expert
    assert [(expert, at) for expert, at, _ in placement.replicas] == [
        (expert, at) for expert in range(placement.num_experts) for at in placement.holders(expert)]
    home_slots = [divmod(physical, placement.slots_per_position)[0] for physical in placement.physical]
    assert home_slots == list(placement.home)


def test_plain_expert_parallelism_is_blocks_of_neighbours():
    placement = contiguous(8, 4)
    assert placement.home == (0, 0, 1, 1, 2, 2, 3, 3)
    assert placement.physical == tuple(range(8)) and placement.slots_per_position == 2


def test_a_position_may_own_nothing():
    assert LayerPlacement((1, 1), 3).experts_of(0) == () == LayerPlacement((1, 1), 3).experts_of(2)


@pytest.mark.parametrize("wrong", [
    {"home": (0, 2)}, {"home": (-1,)}, {"copies": ((0, 2),)}, {"copies": ((2, 0),)}, {"copies": ((0, 0),)},
    {"copies": ((0, 1), (0, 1))}, {"sliced": (2,)}, {"sliced": (1, 1)}], ids=str)
def test_refuses_homes_and_copies_that_cannot_be(wrong):
    with pytest.raises(AssertionError):
        LayerPlacement(**{"home": (0, 1), "positions": 2, **wrong})


def test_layers_may_differ_and_records_compare_by_value():
    placement = ExpertPlacement((("layers.0.moe", contiguous(4, 2)), ("layers.1.moe", contiguous(8, 2))))
    assert placement["layers.1.moe"].num_experts == 8
    same = ExpertPlacement((("layers.0.moe", contiguous(4, 2)), ("layers.1.moe", contiguous(8, 2))))
    assert placement == same and hash(placement) == hash(same)
    with pytest.raises(KeyError):
        placement["layers.2.moe"]


@FEW
@given(st.integers(1, 600), st.integers(1, 70))
def test_blocks_differ_by_one_at_most(experts, positions):
    placement = contiguous(experts, positions)
    sizes = [len(placement.experts_of(position)) for position in range(positions)]
    assert sum(sizes) == experts and max(sizes) - min(sizes) <= 1
    assert list(placement.home) == sorted(placement.home)


def test_copies_come_after_homes_by_where_they_come_from():
    placement = LayerPlacement((1, 0, 1, 2), 3, ((3, 0), (0, 0), (2, 0), (1, 2)))
    assert [placement.slots_of(at) for at in range(3)] == [(1, 0, 2, 3), (0, 2), (3, 1)]
    assert placement.slots_per_position == 4
    assert placement.holders(0) == (0, 1) and placement.holders(1) == (0, 2)
    assert placement.replicas == ((0, 0, 1), (0, 1, 4), (1, 0, 0), (1, 2, 9), (2, 0, 2), (2, 1, 5), (3, 0, 3),
                                  (3, 2, 8))
    assert placement.physical == (4, 0, 5, 8)
    assert placement.without_copies() == LayerPlacement((1, 0, 1, 2), 3)


def test_the_order_in_which_copies_are_named_does_not_count():
    one, other = (ExpertPlacement((("a", LayerPlacement((0, 1), 2, copies)),))
                  for copies in (((0, 1), (1, 0)), ((1, 0), (0, 1))))
    assert one == other and one.digest == other.digest and one.homes.digest != one.digest


def test_sliced_experts_lie_nowhere_whole_and_are_computed_last():
    placement = LayerPlacement((1, 0, 1, 2), 3, ((3, 0), (0, 0), (2, 0), (1, 2)), (0, 1))
    assert [placement.experts_of(at) for at in range(3)] == [(), (2,), (3,)]
    assert placement.copies_at(0) == (2, 3) and placement.whole_copies == ((2, 0), (3, 0))
    assert [placement.assembled_at(at) for at in range(3)] == [(0, 1), (0,), (1,)]
    assert [placement.slots_of(at) for at in range(3)] == [(2, 3, 0, 1), (2, 0), (3, 1)]
    assert placement.physical == (5, 3, 4, 8) and placement.holders(0) == (0, 1)
    assert {(expert, at) for expert, at, _ in placement.replicas} == {
        (0, 0), (0, 1), (1, 0), (1, 2), (2, 0), (2, 1), (3, 0), (3, 2)}
    assert placement.without_copies() == LayerPlacement((1, 0, 1, 2), 3, (), (1, 0))
    assert placement.whole == LayerPlacement((1, 0, 1, 2), 3, placement.copies)


def test_a_placement_with_sliced_experts_is_another_one():
    one, other = (ExpertPlacement((("a", LayerPlacement((0, 1), 2, (), sliced)),)) for sliced in ((), (1,)))
    assert one != other and one.homes != other.homes and one.digest != other.digest and one == other.whole


@FEW
@given(st.integers(0, 1000), st.integers(1, 70))
def test_slices_are_all_rows_once_and_as_equal_as_can_be(rows, positions):
    held = [slice_rows(rows, at, positions) for at in range(positions)]
    assert [row for part in held for row in part] == list(range(rows))
    assert max(map(len, held)) - min(map(len, held)) <= 1


@FEW
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3), st.integers(1, 6))
def test_slices_of_all_matrices_are_all_numbers_of_an_expert_once(shapes, positions):
    numbers = range(sum(rows * columns for rows, columns in shapes))
    held = [number for at in range(positions) for part in slice_columns(shapes, at, positions)
            for number in numbers[part]]
    assert sorted(held) == list(numbers)
