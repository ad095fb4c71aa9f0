"""The entropy loss: its value, and its gradient where probabilities are 0."""

import pytest
import torch

from moetrain.losses.base import Pooled
from moetrain.losses.entropy import EntropyLoss
from moetrain.ops.router_sums import router_sums


def loss_of(logits_TE):
    stats = router_sums(logits_TE.softmax(-1), logits_TE, torch.zeros(len(logits_TE), 1, dtype=torch.int64),
                        None)
    return EntropyLoss().value(stats, Pooled(stats.counts_E, torch.tensor(len(logits_TE))))


def test_it_is_the_log_of_the_number_of_equal_experts_and_0_for_a_router_that_is_sure():
    assert loss_of(torch.zeros(3, 4)).item() == pytest.approx(torch.tensor(4.0).log().item())
    assert loss_of(torch.tensor([[200.0, 0, 0]])).item() == 0


def test_its_gradient_is_finite_where_float32_makes_a_probability_0():
    """The derivative of -p log p is infinite at 0, and 0 times infinity is no number."""
    logits_TE = torch.tensor([[300.0, 299.0, 0.0], [1.0, 2.0, 3.0]], requires_grad=True)
    (ours_TE,) = torch.autograd.grad(loss_of(logits_TE), logits_TE)
    (truth_TE,) = torch.autograd.grad(loss_of(exact := logits_TE.detach().double().requires_grad_()), exact)
    torch.testing.assert_close(ours_TE, truth_TE.float())
