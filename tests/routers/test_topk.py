"""Softmax top-k routing: gate conventions, padding, ties, and the gradient to the router."""

import pytest
import torch
from torch import Tensor

from moetrain.routers.base import RouterContext
from moetrain.routers.topk import TopKRouter

CONTEXT = RouterContext()


def router_of(weights: str = "renorm", *, experts: int = 6, k: int = 2,
              dtype: torch.dtype = torch.float64) -> TopKRouter:
    router = TopKRouter(dim=3, num_experts=experts, top_k=k, weights=weights).to(dtype)
    with torch.no_grad():
        router.weight.copy_(torch.randn(experts, 3, generator=torch.Generator().manual_seed(0)))
    return router


def tokens(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, 3, dtype=dtype, generator=torch.Generator().manual_seed(1))


def expected_weights(router: TopKRouter, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """ids and gate weights from the definition, with torch.topk on the logits."""
    logits_TE = x_TD @ router.weight.T
    chosen_TK, ids_TK = logits_TE.topk(router.top_k)
    if router.weights == "raw":
        return ids_TK, logits_TE.exp().gather(1, ids_TK) / logits_TE.exp().sum(1, keepdim=True)
    return ids_TK, chosen_TK.exp() / chosen_TK.exp().sum(1, keepdim=True)


@pytest.mark.parametrize("weights", ["renorm", "raw", "softmax_of_topk"])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_weights_and_their_gradients_follow_the_convention(weights, count):
    router, x_TD = router_of(weights), tokens(count).requires_grad_()
    routing = router.route(x_TD, CONTEXT)
    ids_TK, weights_TK = expected_weights(router, x_TD)
    assert routing.ids_TK.equal(ids_TK) and routing.max_rows == 2 * count
    torch.testing.assert_close(routing.weights_TK, weights_TK)
    scale_TK = torch.randn(count, 2, dtype=torch.float64)
    ours, truth = (torch.autograd.grad(w, (x_TD, router.weight), scale_TK)
                   for w in (routing.weights_TK, weights_TK))
    torch.testing.assert_close(ours, truth)


def test_renormalising_is_the_softmax_of_the_chosen_logits():
    x_TD = tokens(9)
    renorm, of_topk = (router_of(weights).route(x_TD, CONTEXT) for weights in ("renorm", "softmax_of_topk"))
    assert renorm.ids_TK.equal(of_topk.ids_TK)
    torch.testing.assert_close(renorm.weights_TK, of_topk.weights_TK)
    torch.testing.assert_close(renorm.weights_TK.sum(1), torch.ones(9, dtype=torch.float64))


def test_equal_scores_go_to_the_lower_ids():
    router = router_of(experts=5, k=3)
    torch.nn.init.zeros_(router.weight)
    assert router.route(tokens(2), CONTEXT).ids_TK.tolist() == [[0, 1, 2]] * 2
    with torch.no_grad():
        router.weight[1] = router.weight[4] = torch.tensor([1.0, 0, 0])
    assert router.route(torch.eye(3, dtype=torch.float64)[:1], CONTEXT).ids_TK.tolist() == [[1, 4, 0]]


@pytest.mark.parametrize("weights", ["renorm", "raw", "softmax_of_topk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_padding_chooses_nothing_and_leaves_no_trace(weights, dtype):
    router, x_TD = router_of(weights, dtype=dtype), tokens(5, dtype).requires_grad_()
    valid_T = torch.tensor([True, False, True, False, False])
    routing = router.route(x_TD, RouterContext(valid_T=valid_T))
    alone = router.route(x_TD[valid_T], CONTEXT)
    assert (routing.ids_TK[~valid_T] == -1).all() and not routing.weights_TK[~valid_T].any()
    assert routing.ids_TK[valid_T].equal(alone.ids_TK)
    for ours, its in zip(routing.stats, alone.stats):
        torch.testing.assert_close(ours, its)
    # The gradient that reaches a padding slot is not zero here, and yet goes nowhere.
    scale_TK = torch.randn(5, 2, dtype=dtype)
    ours, its = (torch.autograd.grad((r.weights_TK * s).sum() + r.stats.prob_sum_E[0] + r.stats.lse2_sum,
                                     (x_TD, router.weight))
                 for r, s in ((routing, scale_TK), (alone, scale_TK[valid_T])))
    assert not ours[0][~valid_T].any() and ours[0].isfinite().all()
    torch.testing.assert_close(ours, its)


def test_only_padding_routes_nothing():
    routing = router_of().route(tokens(3), RouterContext(valid_T=torch.zeros(3, dtype=torch.bool)))
    assert routing.stats.tokens == routing.stats.active_sum == 0 and not routing.stats.counts_E.any()
    assert routing.weights_TK.tolist() == [[0, 0]] * 3


def test_bfloat16_tokens_are_routed_in_float32():
    router = router_of(dtype=torch.float32)
    x_TD = tokens(4).bfloat16()
    routing = router.route(x_TD, CONTEXT)
    assert routing.weights_TK.dtype == torch.float32
    assert routing.weights_TK.equal(router.route(x_TD.float(), CONTEXT).weights_TK)
