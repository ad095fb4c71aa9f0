"""Choices that compute nothing, by the equations of AdaMoE and MoE++."""

import math

import numpy as np
import pytest
import torch

from moetrain.config.compose import compose
from moetrain.errors import ConfigErrors
from moetrain.routers.base import RouterContext, Routing
from moetrain.routers.null_expert import NullExpertRouter
from moetrain.routers.topk import TopKRouter
from tests.support.training import make_run

E, D, T, K = 6, 5, 200, 4
X = torch.randn(T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def router_of(k: int = K, **arguments) -> NullExpertRouter:
    router = NullExpertRouter(dim=D, num_experts=E, top_k=k, **arguments).double()
    with torch.no_grad():
        for number, parameter in enumerate(router.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    return router


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max())
    return powers / powers.sum()


def by_the_papers(router: NullExpertRouter, x: np.ndarray, expert_out: np.ndarray,
                  before: np.ndarray | None = None) -> np.ndarray:
    """Output of a layer for one token: expert i gives `expert_out[i]`."""
    logits = router.weight.detach().numpy() @ x
    if before is not None:
        logits = logits + router.logit_map.detach().numpy() @ before
    probabilities = softmax(logits)
    chosen = np.argsort(-probabilities, kind="stable")[:router.top_k]
    null = range(E, router.first_copy)
    real = [choice for choice in chosen if choice not in null]
    total = sum(probabilities[choice] for choice in real) if router.renorm == "real" else 1.0
    out = np.zeros(D)
    for choice in real:
        if choice < E:
            output = expert_out[choice]
        elif choice < router.first_constant:
            output = x
        else:
            number = choice - router.first_constant
            a_1, a_2 = softmax(router.mixing.detach().numpy()[2 * number:2 * number + 2] @ x)
            output = a_1 * x + a_2 * router.constants.detach().numpy()[number]
        out += probabilities[choice] / total * output
    return out


def output_of(routing: Routing, expert_out: torch.Tensor) -> torch.Tensor:
    """What a layer makes of a decision, if expert i gives `expert_out[i]`."""
    out_TD = (routing.weights_TK[..., None] * expert_out[routing.ids_TK.clamp(min=0)]).sum(1)
    if routing.residual_T is not None:
        out_TD = out_TD + routing.residual_T[:, None] * X
    return out_TD if routing.residual_TD is None else out_TD + routing.residual_TD


@pytest.mark.parametrize("arguments", [
    {}, {"renorm": "none"}, {"num_null": 1, "num_copy": 2}, {"num_null": 2, "num_constant": 2},
    {"num_null": 1, "num_copy": 1, "num_constant": 2, "map_logits": True},
    {"num_null": 0, "num_copy": 1, "renorm": "none"},
], ids=str)
def test_a_layer_computes_what_the_papers_say(arguments):
    router = router_of(**arguments)
    expert_out = torch.randn(E, D, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    before = router.route(X.flip(0), RouterContext()).carry
    assert (before is None) == (router.logit_map is None)
    routing = router.route(X, RouterContext(carry=before))
    expected = np.stack([
        by_the_papers(router, X[token].numpy(), expert_out.numpy(),
                      None if before is None else before[token].detach().numpy()) for token in range(T)])
    found = output_of(routing, expert_out).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


def test_without_other_choices_it_is_top_k():
    router, top_k = router_of(num_null=0), TopKRouter(dim=D, num_experts=E, top_k=K).double()
    top_k.load_state_dict(router.state_dict())
    ours, its = router.route(X, RouterContext()), top_k.route(X, RouterContext())
    assert ours.ids_TK.equal(its.ids_TK) and ours.stats.counts_E.equal(its.stats.counts_E)
    torch.testing.assert_close(ours.weights_TK, its.weights_TK)


def test_the_task_does_not_train_null_logits_under_real_and_does_under_none():
    """The denominator of the softmax cancels: exactly, as no null logit is read."""
    for renorm, trained in (("real", False), ("none", True)):
        router = router_of(renorm=renorm, num_null=3)
        routing = router.route(X, RouterContext())
        (routing.weights_TK * torch.rand(T, K)).sum().backward()
        assert bool(router.weight.grad[E:].any()) == trained and router.weight.grad[:E].any()


def test_a_token_with_null_choices_alone_has_no_expert_and_no_gradient():
    layer = make_run(["run.dtype=float64", "router=null_expert", "model.top_k=3"]).state.model.layers[0].moe
    x_TD = torch.randn(20, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).abs()
    with torch.no_grad():
        layer.router.weight[:8] = -1
        layer.router.weight[8:] = 1
    told = RouterContext(router=layer.name)
    routing = layer.router.route(x_TD, told)
    assert (routing.ids_TK == -1).all() and routing.stats.counts_E.tolist() == [0] * 8 + [20] * 3 + [0] * 5
    out_TD = layer(x_TD.requires_grad_(), told).out_TD
    assert not out_TD.any()
    out_TD.sum().backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in layer.parameters())


def test_at_equal_probabilities_the_number_of_experts_is_hypergeometric():
    """k E / C experts of a token in the mean; none at all in C(m, k) / C(E + m, k) of them."""
    router = NullExpertRouter(dim=E + 6, num_experts=E, top_k=K, num_null=6).double()
    x_TD = torch.randn(4000, E + 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.nn.init.eye_(router.weight)                        # independent logits
    used_T = (router.route(x_TD, RouterContext()).ids_TK >= 0).sum(1).double()
    assert used_T.mean() == pytest.approx(K * E / (E + 6), abs=0.05)
    assert (used_T == 0).double().mean() == pytest.approx(math.comb(6, K) / math.comb(E + 6, K), abs=0.01)


@pytest.mark.parametrize("overrides, code, advice", [
    (["model.top_k=1"], "E-CONFIG-030", "router.renorm=none"),
    (["router.num_null=-1"], "E-CONFIG-064", "router.num_null="),
])
def test_what_cannot_be_trained_is_refused(overrides, code, advice):
    with pytest.raises(ConfigErrors) as caught:
        compose(["router=null_expert", *overrides])
    (error,) = caught.value.errors
    assert error.id == code and advice in error.next
