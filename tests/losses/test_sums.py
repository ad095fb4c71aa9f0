"""Losses of further and of pooled sums: parts of a batch have the value and the gradient of the formula."""

import pytest
import torch

from moetrain.losses.first_choice import FirstChoiceLoss
from moetrain.losses.importance import ImportanceLoss
from moetrain.ops.router_sums import Decided, extra_sums, first_choices, importance
from moetrain.routers.base import RouterContext
from moetrain.routers.stack import stacks
from moetrain.routers.topk import TopKRouter
from moetrain.train.count_pool import add_totals, totals_of
from moetrain.train.metrics import pool
from tests.support.sum_losses import MutualInformationLoss, PeakLoss, by_autograd, peak_sum

LOSSES = [FirstChoiceLoss(weight=0.3), ImportanceLoss(weight=0.2), MutualInformationLoss(weight=0.5),
          PeakLoss()]
FORMS = {"first_E": first_choices, "importance_E": importance, "local_sum": peak_sum}
POOLED = ("first_E", "importance_E", "prob_sum_E", "tokens")
SIZES = {"a": 5, "b": 5}


@pytest.fixture
def routers() -> dict[str, TopKRouter]:
    generator, made = torch.Generator().manual_seed(0), {}
    for name, experts in SIZES.items():
        made[name] = TopKRouter(dim=4, num_experts=experts, top_k=2, weights="raw").double()
        with torch.no_grad():
            made[name].weight.copy_(torch.randn(experts, 4, generator=generator))
    return made


def gradient(routers, x_TD: torch.Tensor, sizes: list[int], injected: bool) -> tuple[float, torch.Tensor]:
    """Loss and its gradient at the tokens, from micro-batches of these sizes."""
    context = RouterContext(token_sums=FORMS)
    parts = [{name: router.route(part_TD, context).stats for name, router in routers.items()}
             for part_TD in x_TD.split(sizes)]
    totals = {}
    for part in parts:
        totals = add_totals(totals, {name: totals_of(stats, POOLED) for name, stats in part.items()})
    counts = torch.cat([sum(part[name].counts_E for part in parts) for name in routers])
    pooled = pool(counts, SIZES, torch.tensor(len(x_TD)), totals)
    value, surrogate = 0.0, torch.zeros((), dtype=torch.float64)
    for part in parts:
        for stack, of_stack in zip(stacks(part), pooled, strict=True):
            for loss in LOSSES:
                weight = loss.weight / (len(routers) if loss.reduction == "mean" else 1)
                contribution = weight * loss.value(stack.stats, of_stack).sum()
                value += contribution.item()
                slopes = loss.slopes(stack.stats, of_stack)
                surrogate = surrogate + (contribution if not injected else weight * sum(
                    (slope * stack.stats.named()[name]).sum() for name, slope in slopes.items()))
    return value, torch.autograd.grad(surrogate, x_TD)[0]


@pytest.mark.parametrize("injected", [False, True])
@pytest.mark.parametrize("sizes", [[30], [11, 0, 19]])
def test_parts_have_the_value_and_the_gradient_of_the_whole(routers, sizes, injected):
    generator = torch.Generator().manual_seed(1)
    x_TD = torch.randn(30, 4, dtype=torch.float64, generator=generator).requires_grad_()
    probs = [router.logits(x_TD).softmax(-1) for router in routers.values()]
    ids = [probs_TE.detach().sort(descending=True, stable=True).indices[:, :2] for probs_TE in probs]
    truth = by_autograd(probs, [probs_TE.gather(1, ids_TK) for probs_TE, ids_TK in zip(probs, ids)], ids)
    value, grad_TD = gradient(routers, x_TD, sizes, injected)
    assert value == pytest.approx(truth.item(), rel=1e-12)
    torch.testing.assert_close(grad_TD, torch.autograd.grad(truth, x_TD)[0], rtol=1e-10, atol=1e-14)


def test_padding_counts_nowhere_whatever_it_holds():
    generator = torch.Generator().manual_seed(2)
    probs_TC = torch.rand(6, 3, generator=generator)
    ids_TK, weights_TK = torch.tensor([[0, 1], [2, 0], [1, -1], [0, 2], [-1, -1], [-1, -1]]), torch.rand(6, 2)
    valid_T = torch.arange(6) < 4
    clean = extra_sums(FORMS, Decided(probs_TC[:4], None, ids_TK[:4], weights_TK[:4]), None)
    probs_TC[4:], weights_TK[4:] = float("nan"), float("inf")
    padded = extra_sums(FORMS, Decided(probs_TC, None, ids_TK, weights_TK), valid_T)
    assert all(torch.allclose(padded[name], total) for name, total in clean.items())
    assert padded["first_E"].tolist() == [2, 1, 1]


def test_a_sum_named_like_a_field_is_refused():
    decided = Decided(torch.rand(2, 3), None, torch.zeros(2, 1, dtype=torch.int64), torch.rand(2, 1))
    with pytest.raises(AssertionError, match="tokens"):
        extra_sums({"tokens": first_choices}, decided, None)
