"""The correctness loss: DriftMoE's binary cross-entropy in numpy, on the experts that ran."""

import numpy as np
import pytest
import torch

from moetrain.losses.base import Pooled
from moetrain.losses.correctness import CorrectnessLoss
from moetrain.ops.router_sums import Decided, extra_sums
from moetrain.routers.base import RouterContext
from moetrain.routers.topk import TopKRouter
from tests.support.training import alone, difference, in_float64, train_steps, union

T, E, K = 12, 5, 2


def by_the_paper(logits: np.ndarray, ids: np.ndarray, predicted: np.ndarray) -> float:
    """Binary cross-entropy towards the mask, over the experts of scored tokens."""
    total = 0.0
    for z, chosen, right in zip(logits, ids, predicted):
        mask, s = float(right == 1), 1 / (1 + np.exp(-z[chosen]))
        if right >= 0:
            total += -(mask * np.log(s) + (1 - mask) * np.log(1 - s)).mean()
    return total / len(logits)


def test_it_is_the_binary_cross_entropy_of_the_experts_that_ran():
    router = TopKRouter(dim=4, num_experts=E, top_k=K).double()
    generator, loss = torch.Generator().manual_seed(0), CorrectnessLoss()
    torch.nn.init.normal_(router.weight, generator=generator)
    x_TD = torch.randn(T, 4, generator=generator, dtype=torch.float64)
    routing = router.route(x_TD, RouterContext(token_values=loss.token_values))
    predicted_T = torch.arange(T) % 3 - 1
    pooled = Pooled(routing.stats.counts_E, torch.tensor(T), predicted_T=predicted_T)
    value = loss.value(routing.stats, pooled)
    logits_TE = router.logits(x_TD).detach().numpy()
    expected = by_the_paper(logits_TE, routing.ids_TK.numpy(), predicted_T.numpy())
    assert value.item() == pytest.approx(expected, rel=1e-12)
    value.backward()
    assert router.weight.grad.any()


def test_padding_and_routers_without_logits_cost_nothing():
    loss, valid_T = CorrectnessLoss(), torch.tensor([True, False])
    logits_TE = torch.tensor([[0.0], [float("nan")]]).expand(2, E)
    decided = Decided(torch.ones(2, E), logits_TE, torch.tensor([[0, 1], [-1, -1]]), torch.zeros(2, 2))
    values = extra_sums(loss.token_values, decided, valid_T)
    assert values["cost_if_right_T"].tolist() == pytest.approx([np.log(2), 0])
    values = extra_sums(loss.token_values, decided._replace(logits_TC=None), valid_T)
    assert not any(value.any() for value in values.values())


@pytest.mark.ranks
def test_it_trains_alike_on_two_ranks_in_parts_injected_and_in_chunks_of_the_head(ranks):
    whole = alone(_given(1), 2)
    parts = ["train.aux_loss=injected", "train.count_pass=true", "train.head_chunk=7"]
    ours = union(ranks(2).run(train_steps, [*_given(2, 3), "parallel=ep", *parts], 2))
    for name in ("gradients", "parameters"):
        error, tensor = difference(getattr(ours, name), getattr(whole, name))
        assert error < 1e-10, (name, tensor, error)
    for mine, other in zip(ours.metrics, whole.metrics, strict=True):
        assert mine["loss/correctness"] == pytest.approx(other["loss/correctness"], rel=1e-10)


def _given(size: int, accumulation: int = 1) -> list[str]:
    return [*in_float64(size, accumulation), "loss=[z,correctness]", "loss.correctness.weight=0.5"]
