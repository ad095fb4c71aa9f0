"""Formulas of the memory that copies take.

That this is what is allocated is tested in tests/integration/test_fssdp_memory.py.
"""

from typing import NamedTuple

import pytest

from moetrain.plan.cost.memory import CopyMemory, HeldExperts, copy_memory, held_at
from moetrain.plan.placement import LayerPlacement

SIZES = (300, 200)           # numbers of an expert, and of its largest parameter
LAYERS = [HeldExperts(*held, *SIZES) for held in ((2, 1, 0), (2, 3, 4), (1, 0, 2), (0, 4, 0))]


def test_what_a_position_holds():
    placement = LayerPlacement((0, 0, 1, 2), 3, ((0, 1), (0, 2), (1, 2), (2, 0)))
    assert [held_at(placement, position, [200, 100]) for position in range(3)] == [
        HeldExperts(*held, *SIZES) for held in ((2, 1, 3), (1, 1, 1), (1, 2, 0))]


class Case(NamedTuple):
    """Experts that are in memory at once; kept copies are those of all layers."""

    rematerialize: bool = False
    recompute: bool = False
    copies: int = 8
    sending: int = 4


@pytest.mark.parametrize("case", [
    Case(), Case(recompute=True), Case(rematerialize=True, copies=4, sending=6),
    Case(rematerialize=True, recompute=True, copies=4)], ids=str)
def test_each_part_at_its_peak(case):
    memory = copy_memory(LAYERS, weight=2, gradient=4, rematerialize=case.rematerialize,
                         recompute=case.recompute)
    assert memory == CopyMemory(copies=case.copies * 600, sending=case.sending * 600, sums=8 * 1200,
                                returned=6 * 1200, beside=5 * 400)


def test_nothing_is_laid_beside_homes_where_there_are_no_copies():
    memory = copy_memory([HeldExperts(3, 0, 2, 30, 20)], weight=4, gradient=4, rematerialize=False,
                         recompute=False)
    assert memory == CopyMemory(copies=0, sending=240, sums=0, returned=240, beside=0)


def test_layers_count_with_their_own_sizes():
    memory = copy_memory([HeldExperts(1, 2, 1, 30, 20), HeldExperts(3, 1, 2, 100, 50)], weight=2, gradient=4,
                         rematerialize=True, recompute=True)
    assert memory == CopyMemory(copies=200, sending=400, sums=640, returned=920, beside=400)
