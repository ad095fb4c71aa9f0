"""Experts by domain: who may use which, and probabilities among the allowed ones alone."""

import numpy as np
import pytest
import torch

from moetrain.errors import ConfigError
from moetrain.model.initialization import materialize
from moetrain.routers.base import RouterContext
from moetrain.routers.domain import DomainRouter
from moetrain.routers.topk import TopKRouter
from tests.support.training import make_run

E, D, T = 6, 5, 30
LISTS = [[0, 1, 2], [5, 2, 3, 4], [0, 1, 2, 3, 4, 5]]


def router_of(experts=LISTS, **given) -> DomainRouter:
    router = DomainRouter(dim=D, num_experts=E, top_k=2, experts=experts, **given)
    materialize(router, seed=3, std=1.0, num_layers=1)
    return router


def tokens() -> torch.Tensor:
    return torch.randn(T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


CONTEXT = RouterContext(domains_T=torch.arange(T) % len(LISTS))


@pytest.mark.parametrize("weights", ["renorm", "raw"])
def test_a_token_chooses_among_the_experts_of_its_domain(weights):
    router = router_of(weights=weights)
    found = router.route(tokens(), CONTEXT)
    logits_TE = tokens().numpy() @ router.weight.detach().numpy().T
    probs_TE = np.zeros((T, E))
    for token, logits_E in enumerate(logits_TE):
        own = np.array(sorted(LISTS[token % 3]))
        probs_TE[token, own] = np.exp(logits_E[own]) / np.exp(logits_E[own]).sum()
        best = own[np.argsort(-logits_E[own])[:2]]
        share = probs_TE[token, best].sum() if weights == "renorm" else 1
        assert found.ids_TK[token].tolist() == best.tolist()
        weights_K = found.weights_TK[token].detach()
        np.testing.assert_allclose(weights_K, probs_TE[token, best] / share, rtol=1e-12)
    np.testing.assert_allclose(found.stats.prob_sum_E.detach(), probs_TE.sum(0), rtol=1e-12)


def test_every_gradient_is_finite_and_none_reaches_an_expert_from_a_token_that_may_not_use_it():
    """The slope of the entropy is infinite at the probability 0 of such an expert."""
    router = router_of([[0, 1, 2], [2, 3, 4], [0, 1, 2, 3, 4]])
    stats = router.route(tokens(), CONTEXT).stats
    total = stats.entropy_sum + stats.lse2_sum + (stats.prob_sum_E * torch.arange(E)).sum()
    grad_ED, = torch.autograd.grad(total, router.weight)
    assert grad_ED.isfinite().all() and grad_ED[:5].any(1).all() and not grad_ED[5].any()


def test_without_lists_it_is_topk():
    router, plain = router_of(None), TopKRouter(dim=D, num_experts=E, top_k=2).double()
    plain.load_state_dict(router.state_dict())
    ours, its = router.route(tokens(), CONTEXT), plain.route(tokens(), CONTEXT)
    assert ours.ids_TK.equal(its.ids_TK) and ours.weights_TK.equal(its.weights_TK)


def test_the_data_must_have_as_many_domains_as_there_are_lists():
    given = ["router=domain", "router.experts=[[0,1],[2,3]]"]
    make_run([*given, "data.num_domains=2"])
    with pytest.raises(ConfigError, match="E-CONFIG-262"):
        make_run([*given, "data.num_domains=3"])
