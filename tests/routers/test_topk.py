"""Softmax top-k routing: gate conventions, padding, ties, the gradient to the router, random decisions."""

import numpy as np
import pytest
import torch
from torch import Tensor

from moetrain.ops.keyed_random import coarse_uniform, gumbel, normal, uniform
from moetrain.routers.base import RouterContext
from moetrain.routers.topk import TopKRouter
from tests.support.any_router import context

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


def test_a_learned_bias_is_part_of_the_logits_whoever_computes_them():
    router, x_TD = TopKRouter(dim=3, num_experts=6, top_k=2, logit_bias=True).double(), tokens(9)
    assert "logit_bias" in router.choice_tensors
    with torch.no_grad():
        router.weight.normal_(generator=torch.Generator().manual_seed(0))
        router.logit_bias.normal_(generator=torch.Generator().manual_seed(2))
    chosen_TK, ids_TK = (x_TD @ router.weight.T + router.logit_bias).topk(2)
    by_op = router.route_in_one(router.logits(x_TD), router.op_rule, CONTEXT)
    for routing in (router.route(x_TD, CONTEXT), by_op):
        assert routing.ids_TK.equal(ids_TK)
        torch.testing.assert_close(routing.weights_TK, chosen_TK.softmax(-1))


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


# --- random decisions of training, beside the equations of their papers in numpy

KEY = context(40)
X_TD = tokens(40)


def random_router(experts: int = 6, **options) -> TopKRouter:
    router = TopKRouter(dim=3, num_experts=experts, top_k=2, **options).double()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return router


def softmax(z_TE: np.ndarray) -> np.ndarray:
    powers_TE = np.exp(z_TE - z_TE.max(1, keepdims=True))
    return powers_TE / powers_TE.sum(1, keepdims=True)


def assert_routes(router: TopKRouter, ids: list[list[int]], weights: list[list[float]]) -> None:
    routing = router.route(X_TD, KEY)
    assert routing.ids_TK.tolist() == ids
    np.testing.assert_allclose(routing.weights_TK.detach().numpy(), weights, rtol=1e-12)
    clean_TE = softmax((X_TD @ router.weight.detach().T).numpy())
    np.testing.assert_allclose(routing.stats.prob_sum_E.detach().numpy(), clean_TE.sum(0))


def test_noisy_top_k_gating_keeps_the_largest_noisy_logits():
    """Shazeer et al.: H = x W + N(0, 1) softplus(x V), G = softmax(KeepTopK(H, k))."""
    router = random_router(noise="normal")
    x_TD, w_ED, v_ED = (tensor.detach().numpy() for tensor in (X_TD, router.weight, router.noise_weight))
    drawn_TE = normal(KEY, 6, use="noise", dtype=torch.float64).numpy()
    h_TE = x_TD @ w_ED.T + drawn_TE * np.log1p(np.exp(x_TD @ v_ED.T))
    ids_TK = np.argsort(-h_TE, 1)[:, :2]
    assert_routes(router, ids_TK.tolist(), softmax(np.take_along_axis(h_TE, ids_TK, 1)))


def test_v_moe_takes_the_largest_of_the_softmax_of_noisy_logits():
    router = random_router(noise="vmoe", weights="raw")
    drawn_TE = normal(KEY, 6, use="noise", dtype=torch.float64).numpy()
    gates_TE = softmax((X_TD @ router.weight.detach().T).numpy() + drawn_TE / 6)
    ids_TK = np.argsort(-gates_TE, 1)[:, :2]
    assert_routes(router, ids_TK.tolist(), np.take_along_axis(gates_TE, ids_TK, 1))


def test_gumbel_noise_and_a_sampled_second_expert_choose_and_leave_the_gates_alone():
    """DeepSpeed: argmax(z + Gumbel), then argmax(z + Gumbel) without the first; gates of softmax(z)."""
    router = random_router(noise="gumbel", second_expert="sample")
    z_TE = (X_TD @ router.weight.detach().T).numpy()
    noisy_TE = z_TE + gumbel(KEY, 6, use="noise", dtype=torch.float64).numpy()
    second_TE = noisy_TE + gumbel(KEY, 6, use="second", dtype=torch.float64).numpy()
    first_T = noisy_TE.argmax(1)
    second_TE[np.arange(40), first_T] = -np.inf
    ids_TK = np.stack([first_T, second_TE.argmax(1)], 1)
    chosen_TK = np.take_along_axis(softmax(z_TE), ids_TK, 1)
    assert_routes(router, ids_TK.tolist(), chosen_TK / chosen_TK.sum(1, keepdims=True))


def test_gshard_keeps_the_second_expert_at_random_and_the_weight_of_the_first():
    """Algorithm 1 of GShard, lines 15 to 25 without capacity."""
    router = random_router(second_expert="random")
    drawn_T = uniform(KEY, 1, use="second", dtype=torch.float64)[:, 0].tolist()
    ids, weights = [], []
    for gates_E, rnd in zip(softmax((X_TD @ router.weight.detach().T).numpy()), drawn_T):
        e1, e2 = np.argsort(-gates_E)[:2].tolist()
        g1, g2 = gates_E[[e1, e2]] / (gates_E[e1] + gates_E[e2])
        kept = 2 * g2 > rnd
        ids.append([e1, e2 if kept else -1])
        weights.append([g1, g2 if kept else 0.0])
    assert_routes(router, ids, weights)
    assert {row[1] == -1 for row in ids} == {True, False}


def test_a_second_expert_is_kept_as_often_as_gshard_says():
    router, x_TD = random_router(second_expert="random"), tokens(100_000)
    routing = router.route(x_TD, context(100_000))
    pair_TK = (x_TD @ router.weight.detach().T).topk(2).values.softmax(1)
    kept_T = (2 * pair_TK[:, 1]).clamp(max=1)
    deviation = (kept_T * (1 - kept_T)).sum().sqrt()
    assert (routing.ids_TK[:, 1] >= 0).sum() == pytest.approx(kept_T.sum().item(), abs=3 * deviation.item())


@pytest.mark.parametrize("scope", ["router", "layer"])
def test_jitter_changes_what_the_router_sees_and_once(scope):
    """Twice is a known fault of others; so is a layer whose experts get it without having asked for it."""
    router = random_router(jitter_eps=0.01, jitter_scope=scope)
    told = KEY._replace(decisions=[])
    routing = router.route(X_TD, told)
    drawn_TD = coarse_uniform(KEY, 3, use="jitter", dtype=torch.float64)
    jittered_TD = X_TD * (0.99 + 0.02 * drawn_TD)
    torch.testing.assert_close(told.decisions[0].logits_TE, (jittered_TD @ router.weight.T).detach())
    assert drawn_TD.min() < 0.05 and drawn_TD.max() > 0.95
    if scope == "layer":
        torch.testing.assert_close(routing.input_TD, jittered_TD)
    else:
        assert routing.input_TD is None


@pytest.mark.parametrize("options", [
    {"jitter_eps": 0.5, "jitter_scope": "layer"}, {"noise": "gumbel"}, {"noise": "normal"}, {"noise": "vmoe"},
    {"second_expert": "sample"}, {"second_expert": "random"}], ids=str)
def test_evaluation_is_not_random_and_no_one_op_stands_for_what_is(options, monkeypatch):
    router, plain = random_router(**options), random_router()
    with torch.no_grad():
        plain.weight.copy_(router.weight)
    ours, its = (each.route(X_TD, KEY._replace(training=False)) for each in (router, plain))
    assert ours.ids_TK.equal(its.ids_TK) and ours.weights_TK.equal(its.weights_TK) and ours.input_TD is None
    assert not router.route(X_TD, KEY).weights_TK.equal(its.weights_TK)
    monkeypatch.setattr("moetrain.routers.groups.kernel_takes", lambda logits_TE, rule: True)
    assert plain.in_one(KEY) and router.in_one(KEY) == ("jitter_eps" in options)


def test_noise_of_width_0_is_none():
    router, plain = random_router(noise="normal"), random_router()
    with torch.no_grad():
        plain.weight.copy_(router.weight)
        router.noise_weight.zero_()
        router.noise_weight[:, 0] = -1e5
    ours, its = (each.route(X_TD.abs(), KEY) for each in (router, plain))
    assert ours.ids_TK.equal(its.ids_TK) and ours.weights_TK.equal(its.weights_TK)
