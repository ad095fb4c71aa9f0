"""Choosing experts: stable, decided once, and weights that keep their graph."""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from moetrain.ops.gating import decide, gather_weights, scatter_weights, top_k


def sorted_by_hand(row: list[float], k: int) -> list[int]:
    return sorted(range(len(row)), key=lambda expert: (-row[expert], expert))[:k]


@st.composite
def scores_and_k(draw) -> tuple[Tensor, int]:
    """Few different scores, so that many are equal."""
    experts, tokens = draw(st.integers(1, 9)), draw(st.integers(0, 4))
    score = st.sampled_from([-1.5, -0.0, 0.0, 0.25, 1.0, float("inf")])
    scores = draw(st.lists(score, min_size=tokens * experts, max_size=tokens * experts))
    return torch.tensor(scores, dtype=torch.float32).view(tokens, experts), draw(st.integers(1, experts))


@given(scores_and_k())
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_takes_the_largest_and_of_equals_the_lower_id(drawn):
    scores_TE, k = drawn
    values_TK, ids_TK = top_k(scores_TE, k)
    assert ids_TK.tolist() == [sorted_by_hand(row, k) for row in scores_TE.tolist()]
    assert torch.equal(values_TK, scores_TE.gather(1, ids_TK))
    assert ids_TK.shape == (len(scores_TE), k) and ids_TK.is_contiguous()


def test_equal_scores_give_the_first_ids_at_any_width():
    for experts in (8, 64, 300):                       # a sort may change its algorithm with the width
        assert top_k(torch.full((3, experts), 0.25), 4)[1].tolist() == [[0, 1, 2, 3]] * 3


def test_choosing_has_no_gradient():
    values_TK, _ = top_k(torch.rand(2, 4, requires_grad=True), 2)
    assert not values_TK.requires_grad


def test_a_decision_is_the_same_ids_in_memory_of_their_own():
    ids_TK = torch.tensor([[3, 0], [-1, -1]])
    decided = decide(ids_TK)
    ids_TK.fill_(7)
    assert decided.tolist() == [[3, 0], [-1, -1]] and decided.dtype == torch.int64


@pytest.mark.parametrize("tokens", [0, 3])
def test_decide_is_a_well_formed_op(tokens):
    torch.library.opcheck(torch.ops.moetrain.decide, (torch.zeros(tokens, 2, dtype=torch.int64),))


def test_weights_and_their_gradients_are_those_of_a_one_hot_product():
    probs_TE = torch.rand(4, 5, dtype=torch.float64, requires_grad=True)
    ids_TK = torch.tensor([[0, 4], [2, -1], [-1, -1], [3, 3]])
    one_hot_TKE = torch.nn.functional.one_hot(ids_TK + 1, 6)[..., 1:].double()       # -1: a row of zeros
    grad_TK = torch.rand(4, 2, dtype=torch.float64)

    weights_TK = gather_weights(probs_TE, ids_TK)
    torch.testing.assert_close(weights_TK, (one_hot_TKE * probs_TE[:, None]).sum(-1), rtol=0, atol=0)
    (got,) = torch.autograd.grad(weights_TK, probs_TE, grad_TK)
    torch.testing.assert_close(got, (one_hot_TKE * grad_TK[..., None]).sum(1))
    assert torch.autograd.gradcheck(lambda probs: gather_weights(probs, ids_TK), probs_TE)


def test_weights_of_no_tokens_are_no_weights():
    probs_TE = torch.rand(0, 5, requires_grad=True)
    weights_TK = gather_weights(probs_TE, torch.zeros(0, 2, dtype=torch.int64))
    weights_TK.sum().backward()
    assert weights_TK.shape == (0, 2) and probs_TE.grad.shape == (0, 5)


def test_scattered_weights_come_back_at_any_ids():
    weights_TK = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    ids_TK = torch.tensor([[0, 4], [2, -1], [-1, -1]])
    by_expert_TE = scatter_weights(weights_TK, ids_TK, 5)
    assert by_expert_TE.count_nonzero() == 3 and by_expert_TE[0, 0] == weights_TK[0, 0]
    assert gather_weights(by_expert_TE, ids_TK).equal(weights_TK.where(ids_TK >= 0, 0))
    swapped = gather_weights(by_expert_TE, torch.tensor([[4, -1], [2, 3], [0, -1]]))
    assert swapped.tolist() == [[weights_TK[0, 1], 0], [weights_TK[1, 0], 0], [0, 0]]
    assert torch.autograd.gradcheck(lambda weights: scatter_weights(weights, ids_TK, 5), weights_TK)
