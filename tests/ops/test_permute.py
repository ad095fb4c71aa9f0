"""Rows into slot order and back, against dense one-hot matrices in float64."""

import pytest
import torch
from torch import Tensor

from moetrain.ops.permute import permute, plan_permutation, reorder, unpermute

PHYSICAL = 5
CASES = {
    "one token": [[3, 1]],
    "all to one": [[2], [2], [2]],
    "empty slot ids": [[4, 0], [0, 4], [4, 0]],
    "unused slots": [[1, -1, 0], [-1, -1, -1], [3, 1, 1]],
    "nothing used": [[-1, -1], [-1, -1]],
    "one slot, some unused": [[1], [-1], [0]],
}


def dense(physical_TK: Tensor) -> Tensor:
    """The matrix [R, T] of permute, from a plain loop: by physical id, then token, then slot."""
    tokens, slots = physical_TK.shape
    rows = sorted((int(physical_TK[t, k]), t, k) for t in range(tokens) for k in range(slots)
                  if physical_TK[t, k] >= 0)
    matrix = torch.zeros(len(rows), tokens, dtype=torch.float64)
    for row, (_, token, _) in enumerate(rows):
        matrix[row, token] = 1
    return matrix


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def physical_TK(request) -> Tensor:
    return torch.tensor(request.param)


def test_the_plan_orders_by_id_then_token_then_slot(physical_TK):
    plan = plan_permutation(physical_TK, PHYSICAL)
    used = [(int(p), slot) for slot, p in enumerate(physical_TK.flatten()) if p >= 0]
    assert plan.slots_R.tolist() == [slot for _, slot in sorted(used)]
    assert plan.counts_P.tolist() == [sum(p == id for p, _ in used) for id in range(PHYSICAL)]
    assert (plan.rows_TK < 0).equal(physical_TK < 0)
    assert plan.rows_TK.flatten()[plan.slots_R].tolist() == list(range(len(used)))
    told = plan_permutation(physical_TK, PHYSICAL, rows=len(used))
    assert all(a.equal(b) for a, b in zip(plan, told))


def test_permute_and_its_gradient_are_the_matrix_and_its_transpose(physical_TK):
    plan, matrix = plan_permutation(physical_TK, PHYSICAL), dense(physical_TK)
    x_TD = torch.randn(len(physical_TK), 3, dtype=torch.float64, requires_grad=True)
    rows_RD = permute(x_TD, plan)
    assert rows_RD.equal(matrix @ x_TD)
    grad_RD = torch.randn_like(rows_RD)
    (grad_TD,) = torch.autograd.grad(rows_RD, x_TD, grad_RD)
    torch.testing.assert_close(grad_TD, matrix.T @ grad_RD)


def test_unpermute_and_its_gradient_are_the_transpose_and_the_matrix(physical_TK):
    plan, matrix = plan_permutation(physical_TK, PHYSICAL), dense(physical_TK)
    rows_RD = torch.randn(len(matrix), 3, dtype=torch.float64, requires_grad=True)
    out_TD = unpermute(rows_RD, plan)
    torch.testing.assert_close(out_TD, matrix.T @ rows_RD)
    grad_TD = torch.randn_like(out_TD)
    (grad_RD,) = torch.autograd.grad(out_TD, rows_RD, grad_TD)
    assert grad_RD.equal(matrix @ grad_TD)


def test_gradients_pass_gradcheck_to_second_order():
    plan = plan_permutation(torch.tensor(CASES["unused slots"]), PHYSICAL)
    x_TD = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    rows_RD = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    for function, values in ((permute, x_TD), (unpermute, rows_RD)):
        assert torch.autograd.gradcheck(lambda x: function(x, plan), values)
        assert torch.autograd.gradgradcheck(lambda x: function(x, plan), values)


def test_unpermute_undoes_permute_up_to_the_number_of_used_slots(physical_TK):
    plan = plan_permutation(physical_TK, PHYSICAL)
    x_TD = torch.randint(-8, 8, (len(physical_TK), 3)).double()
    used_T1 = (physical_TK >= 0).sum(1, keepdim=True)
    assert unpermute(permute(x_TD, plan), plan).equal(used_T1 * x_TD)


def test_no_tokens_permute_to_no_rows():
    plan = plan_permutation(torch.zeros(0, 2, dtype=torch.int64), PHYSICAL)
    x_TD = torch.randn(0, 3, requires_grad=True)
    rows_RD = permute(x_TD, plan)
    assert rows_RD.shape == (0, 3) and plan.counts_P.tolist() == [0] * PHYSICAL


def test_no_rows_come_back_to_no_tokens_with_gradients():
    plan = plan_permutation(torch.zeros(0, 2, dtype=torch.int64), PHYSICAL)
    x_TD = torch.randn(0, 3, requires_grad=True)
    out_TD = unpermute(permute(x_TD, plan), plan)
    out_TD.sum().backward()
    assert out_TD.shape == (0, 3) and x_TD.grad.shape == (0, 3)


@pytest.mark.parametrize("rows", [0, 1, 6])
def test_reorder_is_indexing_and_its_gradient_the_inverse(rows):
    index_R = torch.randperm(rows)
    x_RD = torch.randn(rows, 3, dtype=torch.float64, requires_grad=True)
    grad_RD = torch.randn(rows, 3, dtype=torch.float64)
    out_RD = reorder(x_RD, index_R, index_R.argsort())
    expected = x_RD[index_R]
    assert out_RD.equal(expected)
    (got,), (truth,) = (torch.autograd.grad(out, x_RD, grad_RD) for out in (out_RD, expected))
    assert got.equal(truth)


def test_the_ops_are_well_formed():
    plan = plan_permutation(torch.tensor(CASES["unused slots"]), PHYSICAL)
    rows_RD = torch.randn(5, 3, requires_grad=True)
    index_R = torch.tensor([3, 0, 4, 1, 2])
    ops = torch.ops.moetrain
    torch.library.opcheck(ops.permute, (torch.randn(3, 3, requires_grad=True), plan.slots_R, plan.rows_TK))
    torch.library.opcheck(ops.unpermute, (rows_RD, plan.slots_R, plan.rows_TK))
    torch.library.opcheck(ops.reorder, (rows_RD, index_R, index_R.argsort()))
