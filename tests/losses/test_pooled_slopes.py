"""Balance losses that charge choices which are no experts in their own way, by the papers' equations."""

import numpy as np
import pytest
import torch

from moetrain.losses.base import Pooled
from moetrain.losses.hetero_lbl import HeterogeneousBalanceLoss
from moetrain.losses.load_balance import LoadBalanceLoss
from moetrain.losses.null_lbl import NullBalanceLoss
from moetrain.ops.router_sums import RouterSums, router_sums
from moetrain.routers.stack import stacks

E, NULL, K, T = 5, 3, 3, 40
C = E + NULL


def stats_of(seed: int = 0) -> RouterSums:
    logits_TC = torch.randn(T, C, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return router_sums(logits_TC.softmax(-1), logits_TC, logits_TC.topk(K).indices, None)


def value_of(loss, stats: RouterSums, experts: int = E) -> float:
    return loss.value(stats, Pooled(stats.counts_E, torch.tensor(T), None, (experts,))).item()


def test_adamoe_charges_null_experts_by_their_mean_load():
    stats = stats_of()
    share = stats.counts_E.numpy() / (T * K)
    share[E:] = share[E:].mean()
    expected = C * (share * (stats.prob_sum_E.numpy() / T)).sum()
    assert value_of(NullBalanceLoss(), stats) == pytest.approx(expected)


def test_moe_plus_plus_charges_the_share_tau_of_an_expert():
    stats = stats_of()
    eta = np.where(np.arange(C) < E, 1, 0.3)
    expected = (eta * (stats.counts_E.numpy() / T) * (stats.prob_sum_E.numpy() / T)).sum()
    assert value_of(HeterogeneousBalanceLoss(tau=0.3), stats) == pytest.approx(expected)


def test_null_experts_are_interchangeable_and_perfect_balance_is_1():
    stats, order = stats_of(), torch.tensor([*range(E), 7, 5, 6])
    value = value_of(NullBalanceLoss(), stats)
    other = stats._replace(prob_sum_E=stats.prob_sum_E[order])           # loads stay, probabilities move
    for moved in (other, stats._replace(counts_E=stats.counts_E[order])):
        assert value_of(NullBalanceLoss(), moved) == pytest.approx(value, rel=1e-12)
    even = stats._replace(counts_E=torch.tensor([9] * E + [0, 0, 27]))
    assert value_of(NullBalanceLoss(), even) == pytest.approx(1)


def test_with_experts_alone_they_are_the_balance_loss():
    stats = stats_of()
    balance = value_of(LoadBalanceLoss(), stats, C)
    assert value_of(NullBalanceLoss(), stats, C) == pytest.approx(balance, rel=1e-12)
    assert value_of(HeterogeneousBalanceLoss(), stats, C) == pytest.approx(balance * K / C, rel=1e-12)


def test_a_loss_of_weight_0_pools_nothing():
    assert NullBalanceLoss(weight=0).pool is None
    assert HeterogeneousBalanceLoss(mode="sync", weight=0).pooled_sums == frozenset()


@pytest.mark.parametrize("loss", [NullBalanceLoss(), HeterogeneousBalanceLoss(),
                                  NullBalanceLoss(scope="micro")])
def test_routers_of_a_stack_have_their_own_numbers_of_experts(loss):
    parts = {"a": stats_of(0), "b": stats_of(1)}
    (stack,) = stacks(parts)
    value_R = loss.value(stack.stats, Pooled(stack.stats.counts_E, torch.tensor(T), None, (E, C)))
    assert value_R.tolist() == pytest.approx([value_of(loss, parts["a"]), value_of(loss, parts["b"], C)])
