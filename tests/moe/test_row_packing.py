"""What travels for a token: by position it is less, and as much as the formula says."""

from math import comb

import pytest
import torch

from moetrain.moe.row_packing import COMPARED, RowPerRank, RowPerSlot, first_of_kind, most_at_one_position


@pytest.mark.parametrize("experts, positions, top_k, expected", [
    (256, 8, 8, 4.6), (64, 8, 8, 4.75), (128, 4, 8, 2.7), (256, 2, 8, 1.0), (16, 4, 2, 1.4)])
def test_uniform_routing_sends_as_many_remote_rows_as_the_formula_says(experts, positions, top_k, expected):
    """A position has none of a token's k experts with probability C(E - E/P, k) / C(E, k)."""
    formula = (positions - 1) * (1 - comb(experts - experts // positions, top_k) / comb(experts, top_k))
    assert formula == pytest.approx(expected, abs=0.06)
    tokens, slots = 4000, experts // positions
    ids_TK = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(0)).argsort(dim=1)[:, :top_k]
    for form, remote in ((RowPerRank(), formula), (RowPerSlot(), top_k * (positions - 1) / positions)):
        counts = form.num_rows(form.counts(ids_TK, positions, slots))
        assert int(counts[1:].sum()) / tokens == pytest.approx(remote, rel=0.03)        # seen from position 0


def test_both_forms_count_the_slots_of_every_position():
    physical_TK = torch.tensor([[0, 5, 1], [3, -1, -1], [-1, -1, -1], [4, 5, 3]])
    for form, rows in ((RowPerSlot(), [2, 2, 3]), (RowPerRank(), [1, 2, 2])):
        counts_Pw = form.counts(physical_TK, 3, 2)
        assert form.num_slots(counts_Pw).tolist() == [[1, 1], [0, 2], [1, 2]]
        assert form.num_rows(counts_Pw).tolist() == rows


def test_a_row_by_position_brings_the_slots_that_are_there():
    physical_TK = torch.tensor([[0, 5, 1], [3, -1, -1]])
    x_TD, weights_TK = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.0, 0.0]])
    form = RowPerRank()
    x_ND, local_NK, weights_NK = form.pack(x_TD, weights_TK, form.order(physical_TK, 3, 2, 3, 3), 2)
    assert x_ND.tolist() == [[1], [2], [1]]
    assert local_NK.tolist() == [[0, -1, 1], [1, -1, -1], [-1, 1, -1]]
    assert weights_NK.equal(weights_TK[[0, 1, 0]])


@pytest.mark.parametrize("width", [2, 4])
def test_a_row_of_another_width_brings_the_used_slots_alone(width):
    """As wide as the ranks need; a rank whose tokens have fewer slots pads its rows."""
    physical_TK = torch.tensor([[0, 5, 1], [3, -1, -1]])
    x_TD = torch.tensor([[1.0], [2.0]])
    weights_TK = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.0, 0.0]]).requires_grad_()
    form, room = RowPerRank(), [-1] * (width - 2)
    assert most_at_one_position(physical_TK, 3, 2) == 2
    _, local_NW, weights_NW = form.pack(x_TD, weights_TK, form.order(physical_TK, 3, 2, 3, width), 2)
    assert local_NW.tolist() == [[0, 1, *room], [1, -1, *room], [1, -1, *room]]
    assert weights_NW.where(local_NW >= 0, 0).tolist() == torch.tensor(
        [[0.1, 0.3, *[0] * len(room)], [0.4, 0, *[0] * len(room)], [0.2, 0, *[0] * len(room)]]).tolist()
    (grad_TK,) = torch.autograd.grad((weights_NW.where(local_NW >= 0, 0) * (local_NW + 2)).sum(), weights_TK)
    assert grad_TK.tolist() == [[2, 3, 3], [3, 0, 0]]


def test_the_most_slots_at_one_position():
    for ids, most in (([[0, 5, 1, 4, 3]], 2), ([[-1, -1]], 0), ([[3, 2, 0], [5, -1, -1]], 2)):
        assert most_at_one_position(torch.tensor(ids), 3, 2) == most
    assert most_at_one_position(torch.empty(0, 4, dtype=torch.int64), 3, 2) == 0


@pytest.mark.parametrize("slots", [7, COMPARED, COMPARED + 1, 40])
def test_the_first_slot_of_every_kind_is_marked(slots):
    """By comparing all pairs, and by sorting where that would take too much memory."""
    values_TK = torch.randint(-1, 5, (30, slots), generator=torch.Generator().manual_seed(slots))
    expected = [[value not in row[:slot] for slot, value in enumerate(row)] for row in values_TK.tolist()]
    assert first_of_kind(values_TK).tolist() == expected
    assert first_of_kind(values_TK[:0]).shape == (0, slots)
