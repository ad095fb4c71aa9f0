"""ReLU routing by the paper's equations, its penalty, and the controller of its coefficient."""

import numpy as np
import pytest
import torch

from moetrain.config.compose import compose
from moetrain.errors import ConfigErrors
from moetrain.losses.base import Pooled
from moetrain.losses.l1_lb import L1BalanceLoss
from moetrain.routers.base import RouterContext
from moetrain.routers.relu import ReluRouter
from tests.support.training import make_run

E, D, T, K = 6, 5, 30, 2
X = torch.randn(T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def router_of(seed: int = 0, **arguments) -> ReluRouter:
    router = ReluRouter(dim=D, num_experts=E, top_k=K, **arguments).double()
    with torch.no_grad():
        router.weight.copy_(torch.randn(E, D, generator=torch.Generator().manual_seed(seed)))
        router.coefficient.fill_(router.lambda0)
    return router


def test_a_token_takes_every_expert_with_a_positive_logit_and_weighs_it_by_the_logit():
    router = router_of()
    routing = router.route(X, RouterContext())
    gates = np.maximum(X.numpy() @ router.weight.detach().numpy().T, 0)
    found = np.zeros((T, E + 1))
    np.put_along_axis(found, np.where(routing.ids_TK < 0, E, routing.ids_TK), routing.weights_TK.detach(), 1)
    np.testing.assert_allclose(found[:, :E], gates)
    assert routing.stats.counts_E.tolist() == (gates > 0).sum(0).tolist() and routing.max_rows is None
    assert 0 < routing.stats.active_sum < T * E


def penalty_of(router: ReluRouter, loss: L1BalanceLoss, x_TD: torch.Tensor) -> torch.Tensor:
    stats = router.route(x_TD, RouterContext()).stats
    return loss.value(stats, Pooled(stats.counts_E, stats.tokens, {"tokens": stats.tokens.double()}))


@pytest.mark.parametrize("loss", [L1BalanceLoss(), L1BalanceLoss(scope="micro"), L1BalanceLoss(mode="sync")],
                         ids=["exact", "micro", "sync"])
def test_the_penalty_is_the_papers_and_pushes_gates_down(loss):
    router = router_of(lambda0=0.03, target_k=1.5)
    x_TD = X.clone().requires_grad_()
    value = penalty_of(router, loss, x_TD)
    gates = np.maximum(X.numpy() @ router.weight.detach().numpy().T, 0)
    f = E / (1.5 * T) * (gates > 0).sum(0)
    assert value.item() == pytest.approx(0.03 * (f * gates.mean(0)).sum(), rel=1e-12)
    (grad_ED,) = torch.autograd.grad(value, router.weight)
    expected_ED = 0.03 / T * f[:, None] * (gates > 0).T.astype(float) @ X.numpy()
    np.testing.assert_allclose(grad_ED.numpy(), expected_ED, rtol=1e-12, atol=1e-15)
    assert (loss.pooled_sums == {"tokens"}) == (loss.mode == "sync")


def test_the_coefficient_follows_the_sign_of_the_mean_sparsity_over_layers():
    routers = [router_of(seed, alpha=1.2) for seed in range(2)]
    expected = 1e-8
    for used in ((9, 3), (7, 1), (0, 0), (5, 5)):            # of 10 tokens, k = 2: too many, too few, none, k
        counts = [torch.tensor([many] * 4 + [0, 0]) for many in used]
        sparsity = np.mean([1 - 4 * many / (10 * E) for many in used])
        expected *= 1.2 ** np.sign(round((1 - K / E) - sparsity, 12))
        ReluRouter.end_of_step_together(routers, counts, 10)
        assert all(router.coefficient.item() == pytest.approx(expected, rel=1e-12) for router in routers)


def test_the_controller_brings_gates_to_the_target():
    """Logits that follow the penalty alone, from half of all gates open."""
    router, loss = router_of(lambda0=1e-3), L1BalanceLoss()
    logits_TE = torch.randn(400, E, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    start_TE, shares = logits_TE.clone(), []
    for _ in range(300):
        logits_TE.requires_grad_()
        scores = router.scores_of(logits_TE)
        stats = router.decision(scores, logits_TE, RouterContext()).stats
        pull = 0.5 * ((logits_TE - start_TE) ** 2).sum() / 400                 # towards the start
        (loss.value(stats, Pooled(stats.counts_E, stats.tokens)) + pull).backward()
        logits_TE = (logits_TE - 100 * logits_TE.grad).detach()
        ReluRouter.end_of_step_together([router], [stats.counts_E], 400)
        shares.append(stats.active_sum.item() / 400)
    assert shares[0] > 2.5 and np.mean(shares[-50:]) == pytest.approx(K, abs=0.02 * E)


def test_outputs_are_continuous_where_a_logit_crosses_0():
    layer = make_run(["run.dtype=float64", "router=relu"]).state.model.layers[0].moe
    x_TD = torch.randn(1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    row_D = layer.router.weight[3].detach()
    on_edge_TD = x_TD - (x_TD @ row_D / row_D.square().sum())[:, None] * row_D
    step_TD = 1e-7 * row_D
    told = RouterContext(router=layer.name)
    below, above = ((on_edge_TD + sign * step_TD) for sign in (-1, 1))
    taken = [(layer.router.route(x, told).ids_TK == 3).any().item() for x in (below, above)]
    assert taken == [False, True]
    assert (layer(above, told).out_TD - layer(below, told).out_TD).abs().max() < 1e-6


def test_no_positive_logit_anywhere_is_an_output_of_0():
    layer = make_run(["run.dtype=float64", "router=relu"]).state.model.layers[0].moe
    with torch.no_grad():
        layer.router.weight.fill_(-1)
    x_TD = torch.ones(5, 16, dtype=torch.float64, requires_grad=True)
    out = layer(x_TD, RouterContext(router=layer.name))
    out.out_TD.sum().backward()
    assert not out.out_TD.any() and out.stats[layer.name].active_sum == 0 and x_TD.grad.isfinite().all()


@pytest.mark.parametrize("overrides, code, advice", [
    (["router=relu", "router.target_k=9"], "E-CONFIG-255", "router.target_k=8"),
    (["router=relu", "router.alpha=0.5"], "E-CONFIG-064", "router.alpha="),
])
def test_what_cannot_work_is_refused(overrides, code, advice):
    with pytest.raises(ConfigErrors) as caught:
        compose(["model.num_experts=8", *overrides])
    (error,) = caught.value.errors
    assert error.id == code and advice in error.next


def test_the_coefficient_can_always_return():
    """After a thousand steps below the target, or above it, float32 would hold 0 or infinity for ever."""
    for chosen in (0, E):
        router = router_of().float()
        for _ in range(1000):
            ReluRouter.end_of_step_together([router], [torch.full((E,), chosen * 10)], 10)
        held = router.coefficient.item()
        assert held in (pytest.approx(1e-30), pytest.approx(1e30))
        ReluRouter.end_of_step_together([router], [torch.full((E,), (E - chosen) * 10)], 10)
        assert router.coefficient.item() != held
