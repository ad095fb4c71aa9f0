"""Device and communication balance against the equations of DeepSeekMoE and DeepSeek-V2, token by token."""

import numpy as np
import pytest
import torch

from moetrain.losses.base import Pooled
from moetrain.losses.group_balance import CommunicationBalanceLoss, DeviceBalanceLoss
from moetrain.losses.load_balance import LoadBalanceLoss
from moetrain.ops.router_sums import Decided, extra_sums, router_sums
from moetrain.routers.base import RoutingStats
from moetrain.routers.stack import stacks

T, E, K = 20, 8, 3


def decided(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and the K largest of a skewed router."""
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(T, E, dtype=torch.float64, generator=generator) + torch.linspace(0, 2, E)
    probs_TE = logits_TE.softmax(-1).requires_grad_()
    return probs_TE, probs_TE.topk(K).indices


def stacked(loss, probs_TE, ids_TK) -> tuple[RoutingStats, Pooled]:
    """Statistics of one router, and the same as pooled: one micro-batch is the whole step."""
    stats = router_sums(probs_TE, None, ids_TK, None)
    stats = stats._replace(extra=extra_sums(loss.token_sums, Decided(probs_TE, None, ids_TK, ids_TK), None))
    (stack,) = stacks({"a": stats})
    sums = {name: stack.stats.named()[name].detach() for name in loss.pooled_sums}
    return stack.stats, Pooled(stack.stats.counts_E, torch.tensor(T), sums)


def value(loss, probs_TE, ids_TK) -> torch.Tensor:
    return loss.value(*stacked(loss, probs_TE, ids_TK))[0]


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
@pytest.mark.parametrize("scope", ["global", "micro"])
def test_the_losses_are_those_of_the_papers(groups: int, scope: str) -> None:
    probs_TE, ids_TK = decided()
    p, chosen, size, limit = probs_TE.detach().numpy(), ids_TK.numpy(), E // groups, min(groups, 2)
    device = communication = 0.0
    for group in range(groups):
        experts = range(group * size, (group + 1) * size)
        mean_P = sum(p[t, e] for t in range(T) for e in experts) / T
        mean_f = np.mean([E / (K * T) * np.sum(chosen == e) for e in experts])
        sent = sum(any(e in chosen[t] for e in experts) for t in range(T))
        device += mean_f * mean_P
        communication += groups / (limit * T) * sent * mean_P
    of_devices = DeviceBalanceLoss(num_groups=groups, scope=scope)
    sent_to = CommunicationBalanceLoss(num_groups=groups, max_groups=limit, scope=scope)
    assert value(of_devices, probs_TE, ids_TK).item() == pytest.approx(device, rel=1e-12)
    assert value(sent_to, probs_TE, ids_TK).item() == pytest.approx(communication, rel=1e-12)
    if groups in (1, E):                                         # constant; the balance loss of experts
        other = 1.0 if groups == 1 else value(LoadBalanceLoss(), probs_TE, ids_TK).item()
        assert device == pytest.approx(other, rel=1e-12)


@pytest.mark.parametrize("loss", [DeviceBalanceLoss(), CommunicationBalanceLoss()], ids=["device", "sent"])
def test_slopes_are_the_gradient_and_perfect_balance_is_one(loss) -> None:
    probs_TE, ids_TK = decided()
    (grad_TE,) = torch.autograd.grad(value(loss, probs_TE, ids_TK), probs_TE)
    slope_E = loss.slopes(*stacked(loss, probs_TE.detach(), ids_TK))["prob_sum_E"][0]
    torch.testing.assert_close(grad_TE, slope_E.expand(T, E))
    even_TK = torch.arange(2 * E).reshape(E, 2) * 3 % E         # two groups of four for each token, all alike
    even_TE = torch.full((E, E), 1 / E)
    assert loss.value(*_of(loss, even_TE, even_TK))[0].item() == pytest.approx(1)


def _of(loss, probs_TE, ids_TK):
    stats, pooled = stacked(loss, probs_TE, ids_TK)
    return stats, pooled._replace(tokens=torch.tensor(len(ids_TK)))


def test_a_token_in_one_group_is_sent_once_and_padding_nowhere() -> None:
    ids_TK = torch.tensor([[0, 1, -1], [7, 0, 6], [-1, -1, -1]])
    sent = CommunicationBalanceLoss(num_groups=4).token_sums["sent_4"]
    assert sent(Decided(torch.zeros(3, E), None, ids_TK, ids_TK)).tolist() == [2, 0, 0, 1]
