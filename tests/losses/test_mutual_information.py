"""The mutual-information loss: its value on a whole batch by the formula, and its ends."""

import math

import pytest
import torch

from moetrain.losses.base import Pooled
from moetrain.losses.mutual_information import MutualInformationLoss
from moetrain.ops.router_sums import router_sums

T, E = 24, 6


def pieces(probs_TE, size, scope="global"):
    """Value and gradient, summed over micro-batches of one size."""
    probs_TE = probs_TE.clone().requires_grad_()
    loss = MutualInformationLoss(scope=scope)
    pooled = Pooled(torch.zeros(1, E), torch.tensor(T), {
        "prob_sum_E": probs_TE.detach().sum(0)[None], "tokens": torch.full((1,), T, dtype=torch.float64)})
    total = 0
    for first in range(0, T, size):
        part = probs_TE[first:first + size]
        stats = router_sums(part, None, torch.zeros(len(part), 1, dtype=torch.int64), None)
        stacked = stats._replace(**{name: value[None] for name, value in stats.named().items()})
        total = total + loss.value(stacked, pooled).sum()
    return total, *torch.autograd.grad(total, probs_TE)


def by_formula(probs_TE):
    return torch.special.entr(probs_TE).sum(-1).mean() - torch.special.entr(probs_TE.mean(0)).sum()


def draw():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(T, E, generator=generator, dtype=torch.float64).softmax(-1)


@pytest.mark.parametrize("size", [4, 24])
def test_micro_batches_add_up_to_the_loss_of_the_batch_and_its_gradient(size):
    probs_TE = draw().requires_grad_()
    expected = by_formula(probs_TE)
    value, grad_TE = pieces(probs_TE.detach(), size)
    torch.testing.assert_close(value, expected)
    # A probability's gradient counts up to a constant for each token: they sum to 1.
    (other_TE,) = torch.autograd.grad(expected, probs_TE)
    torch.testing.assert_close(grad_TE - grad_TE.mean(1, keepdim=True),
                               other_TE - other_TE.mean(1, keepdim=True))


def test_with_scope_micro_it_is_the_mean_of_the_micro_batches_own():
    probs_TE = draw()
    value, _ = pieces(probs_TE, 8, "micro")
    torch.testing.assert_close(value, sum(by_formula(part) for part in probs_TE.split(8)) / 3)


def test_equal_tokens_have_no_information_and_sure_balanced_ones_have_all():
    assert pieces(draw()[:1].expand(T, E), 8)[0].item() == pytest.approx(0, abs=1e-12)
    value, grad_TE = pieces(torch.eye(E, dtype=torch.float64).repeat(T // E, 1), 8)
    assert value.item() == pytest.approx(-math.log(E))
    one_expert, _ = pieces(torch.eye(E, dtype=torch.float64)[:1].expand(T, E), 8)
    assert one_expert.item() == pytest.approx(0, abs=1e-12)       # the others have no share: no NaN
