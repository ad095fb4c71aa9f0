"""The plan of static size: without alignment that of `plan_permutation`; with it, ids begin at multiples."""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from moetrain.ops.permute import (
    Permutation,
    permute_padded,
    plan_permutation,
    unpermute_padded,
    values_of_rows,
)
from moetrain.ops.route_plan import route_plan

CASES = {
    "one token": [[3, 1]],
    "all to one": [[2], [2], [2]],
    "unused slots": [[1, -1, 0], [-1, -1, -1], [3, 1, 1]],
    "nothing used": [[-1, -1], [-1, -1]],
}
IDS = 5


PROPERTY = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def physical_TK(request) -> Tensor:
    return torch.tensor(request.param)


@st.composite
def physical_ids(draw) -> Tensor:
    """Physical ids [T, K] of any tokens, unused slots among them."""
    tokens, slots = draw(st.integers(0, 6)), draw(st.integers(1, 3))
    ids = draw(st.lists(st.integers(-1, IDS - 1), min_size=tokens * slots, max_size=tokens * slots))
    return torch.tensor(ids, dtype=torch.int64).view(tokens, slots)


def dense(permutation: Permutation) -> Tensor:
    """The matrix [R, T] of the rows, zeros where a row has no slot."""
    matrix = torch.zeros(len(permutation.slots_R), len(permutation.rows_TK))
    for row, slot in enumerate(permutation.slots_R.tolist()):
        if slot >= 0:
            matrix[row, slot // permutation.rows_TK.shape[1]] = 1
    return matrix


@given(physical_ids())
@PROPERTY
def test_without_gaps_it_is_the_exact_plan_and_padding_behind_it(physical_TK):
    exact, used = plan_permutation(physical_TK, IDS), int((physical_TK >= 0).sum())
    plan = route_plan(physical_TK, IDS, used + 4)
    assert plan.permutation.slots_R.tolist() == [*exact.slots_R.tolist(), -1, -1, -1, -1]
    assert plan.permutation.rows_TK.equal(exact.rows_TK) and plan.permutation.counts_P.equal(exact.counts_P)
    assert plan.ends_P.tolist() == exact.counts_P.cumsum(0).tolist() and plan.ends_P.dtype == torch.int32


@given(physical_ids(), st.sampled_from([1, 3, 16, 128]))
@PROPERTY
def test_every_id_begins_at_a_multiple_of_the_alignment(physical_TK, alignment):
    plan = route_plan(physical_TK, IDS, physical_TK.numel() + IDS * (alignment - 1), alignment)
    begins = [0, *plan.ends_P.tolist()][:-1]
    assert all(begin % alignment == 0 for begin in begins) and plan.ends_P[-1] % alignment == 0
    for id, (begin, count) in enumerate(zip(begins, plan.permutation.counts_P.tolist())):
        slots = plan.permutation.slots_R[begin:begin + count].tolist()
        assert slots == [slot for slot, of in enumerate(physical_TK.flatten().tolist()) if of == id]
    assert int((plan.permutation.slots_R >= 0).sum()) == int((physical_TK >= 0).sum())


def test_rows_beyond_the_bound_have_no_place():
    plan = route_plan(torch.tensor([[0], [1], [0]]), 2, 2).permutation
    assert plan.slots_R.tolist() == [0, 2] and plan.rows_TK.tolist() == [[0], [-1], [1]]
    assert plan.counts_P.tolist() == [2, 1]


def test_padded_rows_and_their_gradients_are_a_matrix_and_its_transpose(physical_TK):
    permutation = route_plan(physical_TK, IDS, 96, 16).permutation
    matrix = dense(permutation)
    x_TD = torch.randn(len(physical_TK), 3, requires_grad=True)
    rows_RD = permute_padded(x_TD, permutation)
    assert rows_RD.equal(matrix @ x_TD)
    grad_RD = torch.randn_like(rows_RD)
    torch.testing.assert_close(torch.autograd.grad(rows_RD, x_TD, grad_RD)[0], matrix.T @ grad_RD)

    poisoned_RD = torch.randn(len(matrix), 3)
    poisoned_RD[permutation.slots_R < 0] = torch.nan
    poisoned_RD.requires_grad_()
    out_TD = unpermute_padded(poisoned_RD, permutation)
    torch.testing.assert_close(out_TD, matrix.T @ poisoned_RD.nan_to_num())
    grad_TD = torch.randn_like(out_TD)
    assert torch.autograd.grad(out_TD, poisoned_RD, grad_TD)[0].equal(matrix @ grad_TD)


def test_values_of_rows_are_those_of_their_slots(physical_TK):
    permutation = route_plan(physical_TK, IDS, 20).permutation
    values_TK = torch.randn(physical_TK.shape, requires_grad=True)
    values_R = values_of_rows(values_TK, permutation)
    live_R = permutation.slots_R >= 0
    assert values_R[live_R].equal(values_TK.flatten()[permutation.slots_R[live_R]])
    assert not values_R[~live_R].any()
    (grad_TK,) = torch.autograd.grad((values_R ** 2).sum(), values_TK)
    torch.testing.assert_close(grad_TK, 2 * values_TK.detach().where(physical_TK >= 0, 0))


def test_the_ops_are_well_formed():
    physical_TK = torch.tensor(CASES["unused slots"])
    ops = torch.ops.moetrain
    torch.library.opcheck(ops.route_plan, (physical_TK, IDS, 30, 4))
    slots_R, rows_TK, _ = route_plan(physical_TK, IDS, 30, 4).permutation
    torch.library.opcheck(ops.permute_padded, (torch.randn(3, 4, requires_grad=True), slots_R, rows_TK))
    torch.library.opcheck(ops.unpermute_padded, (torch.randn(30, 4, requires_grad=True), slots_R, rows_TK))
