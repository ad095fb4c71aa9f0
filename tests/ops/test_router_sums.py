"""Sums over tokens: exact, additive over any split, and blind to padding."""

import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from torch import Tensor

from moetrain.ops.router_sums import router_sums

DIFFERENTIABLE = ("prob_sum_E", "lse2_sum", "entropy_sum")


def routed(tokens: int, experts: int = 5,
           dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    logits_TE = torch.randn(tokens, experts, dtype=dtype, generator=torch.Generator().manual_seed(1))
    probs_TE = logits_TE.softmax(-1)
    return probs_TE, logits_TE, probs_TE.argsort(dim=1, descending=True)[:, :2].contiguous()


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_sums_and_gradients_are_those_of_a_loop_over_tokens(tokens):
    probs_TE, logits_TE, ids_TK = routed(tokens)
    probs_TE.requires_grad_(), logits_TE.requires_grad_()
    sums = router_sums(probs_TE, logits_TE, ids_TK, None)

    lse_T = [row.exp().sum().log() for row in logits_TE]
    assert sums.tokens == tokens and sums.active_sum == 2 * tokens
    assert sums.counts_E.tolist() == [(ids_TK == expert).sum().item() for expert in range(5)]
    torch.testing.assert_close(sums.prob_sum_E, sum(probs_TE, torch.zeros(5, dtype=torch.float64)))
    zero = torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(sums.lse2_sum, sum((lse**2 for lse in lse_T), zero))
    torch.testing.assert_close(sums.entropy_sum, sum((-(row * row.log()).sum() for row in probs_TE), zero))

    scale_E = torch.arange(1.0, 6, dtype=torch.float64)
    got = torch.autograd.grad((sums.prob_sum_E * scale_E).sum() + 2 * sums.lse2_sum + 3 * sums.entropy_sum,
                              (probs_TE, logits_TE))
    probs, logits = probs_TE.detach(), logits_TE.detach()
    torch.testing.assert_close(got[0], scale_E - 3 * (probs.log() + 1))
    torch.testing.assert_close(got[1], 4 * logits.logsumexp(-1, keepdim=True) * logits.softmax(-1))


@given(st.lists(st.booleans(), min_size=9, max_size=9), st.lists(st.integers(0, 9), max_size=4).map(sorted))
@example([True, True, False, True, True, True, False, False, True], [2, 2, 3])   # one empty, one of padding
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
def test_shards_add_up_to_the_whole(valid, ends):
    probs_TE, logits_TE, ids_TK = routed(9)
    valid_T = torch.tensor(valid)
    ids_TK = ids_TK.where(valid_T[:, None], -1)
    whole = router_sums(probs_TE, logits_TE, ids_TK, valid_T)
    cuts = [slice(begin, end) for begin, end in zip([0, *ends], [*ends, 9])]
    parts = [router_sums(probs_TE[cut], logits_TE[cut], ids_TK[cut], valid_T[cut]) for cut in cuts]
    for name, value in whole._asdict().items():
        if value is None:                                # of each sequence: tests/losses/test_load_balance.py
            continue
        total = sum(getattr(part, name) for part in parts)
        torch.testing.assert_close(total, value)
        assert total.dtype == value.dtype, name


def test_padding_counts_nowhere_whatever_it_holds():
    probs_TE, logits_TE, ids_TK = routed(4)
    valid_T = torch.tensor([True, False, True, False])
    expected = router_sums(probs_TE[valid_T], logits_TE[valid_T], ids_TK[valid_T], None)
    probs_TE[~valid_T] = logits_TE[~valid_T] = torch.nan
    sums = router_sums(probs_TE, logits_TE, ids_TK.where(valid_T[:, None], -1), valid_T)
    for name, value in expected._asdict().items():
        torch.testing.assert_close(getattr(sums, name), value, msg=name)



@pytest.mark.parametrize("name", ["prob_sum_E", "lse2_sum",
                                  "entropy_sum"])
def test_padding_gets_no_gradient_whatever_it_holds(name):
    probs_TE, logits_TE, ids_TK = routed(4)
    valid_T = torch.tensor([True, False, True, False])
    probs_TE[~valid_T] = logits_TE[~valid_T] = torch.nan
    leaves = probs_TE.requires_grad_(), logits_TE.requires_grad_()
    value = getattr(router_sums(*leaves, ids_TK.where(valid_T[:, None], -1), valid_T), name).sum()
    for grad_TE in torch.autograd.grad(value, leaves, allow_unused=True):
        if grad_TE is not None:
            assert grad_TE[valid_T].isfinite().all() and not grad_TE[~valid_T].any(), grad_TE


def test_a_probability_of_zero_has_entropy_zero():
    probs_TE = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    sums = router_sums(probs_TE, torch.zeros(2, 2), torch.tensor([[0], [0]]), None)
    torch.testing.assert_close(sums.entropy_sum, torch.tensor(2.0).log())


@pytest.mark.parametrize("valid_T", [None, torch.tensor([True, True, False])], ids=["all valid", "padding"])
def test_counts_are_whole_numbers_beyond_the_reach_of_float32(valid_T):
    sums = router_sums(*routed(3, dtype=torch.float32), valid_T)
    for name in ("tokens", "counts_E", "active_sum"):
        value = getattr(sums, name)
        assert value.dtype == torch.int64 and torch.equal(value + 2**24 + 1 - 2**24, value + 1), name
    assert all(getattr(sums, name).dtype == torch.float32 for name in DIFFERENTIABLE)
