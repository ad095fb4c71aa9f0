"""Formulas of the memory that copies take; that they are what is allocated: tests/integration/test_fssdp_memory.py."""

import pytest

from moetrain.plan.cost.memory import CopyMemory, HeldExperts, copy_memory, held_at
from moetrain.plan.placement import LayerPlacement

LAYERS = [HeldExperts(2, 1, 0), HeldExperts(2, 3, 4), HeldExperts(1, 0, 2), HeldExperts(0, 4, 0)]


def test_what_a_position_holds():
    placement = LayerPlacement((0, 0, 1, 2), 3, ((0, 1), (0, 2), (1, 2), (2, 0)))
    assert [held_at(placement, position) for position in range(3)] == [HeldExperts(2, 1, 3), HeldExperts(1, 1, 1), HeldExperts(1, 2, 0)]


@pytest.mark.parametrize("rematerialize, recompute, copies, sending", [
    (False, False, 8, 4), (False, True, 8, 4), (True, False, 4, 6), (True, True, 4, 4)])
def test_each_part_at_its_peak(rematerialize, recompute, copies, sending):
    memory = copy_memory(LAYERS, 300, weight=2, gradient=4, rematerialize=rematerialize, recompute=recompute)
    assert memory == CopyMemory(copies * 600, sending * 600, 8 * 1200, 6 * 1200, 5 * 400)


def test_nothing_is_laid_beside_homes_where_there_are_no_copies():
    assert copy_memory([HeldExperts(3, 0, 2)], 30, weight=4, gradient=4, rematerialize=False, recompute=False) == CopyMemory(
        0, 240, 0, 240, 0)
