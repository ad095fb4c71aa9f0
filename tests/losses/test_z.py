"""The router z-loss: its value, its gradient at the logits, its independence of the split."""

import pytest
import torch

from moetrain.losses.base import Pooled
from moetrain.losses.z import ZLoss
from moetrain.ops.router_sums import router_sums


def stats_of(logits_TE, valid_T=None):
    return router_sums(logits_TE.softmax(-1), logits_TE, torch.zeros(len(logits_TE), 1, dtype=torch.int64),
                       valid_T)


def pooled(tokens: int) -> Pooled:
    return Pooled(torch.zeros(4, dtype=torch.int64), torch.tensor(tokens))


def test_equal_logits_of_zero_give_the_squared_log_of_the_number_of_experts():
    value = ZLoss().value(stats_of(torch.zeros(3, 4)), pooled(3)).item()
    assert value == pytest.approx(torch.tensor(4.0).log().item() ** 2)


def test_the_gradient_is_twice_the_log_sum_exp_times_the_probabilities():
    logits_TE = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    (grad_TE,) = torch.autograd.grad(ZLoss().value(stats_of(logits_TE), pooled(5)), logits_TE)
    logits = logits_TE.detach()
    torch.testing.assert_close(grad_TE, 2 * logits.logsumexp(-1, keepdim=True) * logits.softmax(-1) / 5)


def test_contributions_of_any_split_and_padding_add_up():
    logits_TE = torch.randn(8, 4, dtype=torch.float64)
    valid_T = torch.tensor([True, True, False, True, True, False, True, True])
    whole = ZLoss().value(stats_of(logits_TE[valid_T]), pooled(6))
    for sizes in ([8], [3, 5], [2, 1, 0, 5]):
        parts = zip(logits_TE.split(sizes), valid_T.split(sizes))
        torch.testing.assert_close(sum(ZLoss().value(stats_of(*part), pooled(6)) for part in parts), whole)


def test_slopes_are_the_gradient_of_the_value():
    stats = stats_of(torch.randn(5, 4))._replace(lse2_sum=torch.tensor(3.0, requires_grad=True))
    (truth,) = torch.autograd.grad(ZLoss().value(stats, pooled(7)), stats.lse2_sum)
    assert ZLoss().slopes(stats, pooled(7)) == {"lse2_sum": truth} and ZLoss.pool is None


def test_no_tokens_are_zero_and_finite():
    logits_TE = torch.randn(0, 4, requires_grad=True)
    value = ZLoss().value(stats_of(logits_TE), pooled(0))
    assert value.item() == 0 and torch.autograd.grad(value, logits_TE)[0].shape == (0, 4)
