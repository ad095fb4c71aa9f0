"""Routed slots to physical slots."""

import pytest
import torch

from moetrain.plan.assign import Replicas, assign, replica_table, slot_table, spread
from moetrain.plan.placement import LayerPlacement, contiguous


@pytest.mark.parametrize("placement", [contiguous(4, 2), LayerPlacement((1, 0, 1, 1), 2)], ids=str)
def test_every_slot_goes_where_its_expert_lives_and_unused_ones_nowhere(placement):
    ids_TK = torch.tensor([[0, 3], [2, -1], [-1, -1], [1, 1]])
    physical_TK = assign(ids_TK, slot_table(placement))
    assert physical_TK.dtype == torch.int64
    assert physical_TK.tolist() == [[placement.physical[id] if id >= 0 else -1 for id in row]
                                    for row in ids_TK.tolist()]


def test_contiguous_homes_leave_ids_as_they_are():
    ids_TK = torch.tensor([[3, -1], [0, 2]])
    assert assign(ids_TK, slot_table(contiguous(4, 2))).equal(ids_TK)


def test_no_tokens_are_assigned_to_nothing():
    assert assign(torch.zeros(0, 2, dtype=torch.int64), slot_table(contiguous(4, 2))).shape == (0, 2)


def test_slots_go_to_the_replicas_of_their_expert_in_order():
    placement = LayerPlacement((0, 1, 1), 2, ((1, 0),))
    replicas = Replicas(*replica_table(placement))
    assert replicas.expert_C.tolist() == [0, 1, 1, 2] and replicas.position_C.tolist() == [0, 0, 1, 1]
    ids_TK = torch.tensor([[1, 0], [-1, -1], [2, 1], [1, -1]])
    physical_TK = spread(ids_TK, torch.tensor([1, 2, 1, 1]), replicas)
    home, copy, only = placement.physical[1], 1, placement.physical[2]
    assert physical_TK.tolist() == [[copy, placement.physical[0]], [-1, -1], [only, copy], [home, -1]]


def test_no_slots_are_spread_over_nothing():
    replicas = Replicas(*replica_table(LayerPlacement((0, 1), 2, ((1, 0),))))
    assert spread(torch.full((3, 2), -1), torch.tensor([0, 0, 0]), replicas).tolist() == [[-1, -1]] * 3
