"""Expert choice: every expert takes the same number of tokens of a group, its best ones."""

import math

import numpy as np
import pytest
import torch

from moetrain.routers.base import RouterContext, Routing
from moetrain.routers.expert_choice import ExpertChoiceRouter

E, D, B, S = 8, 5, 3, 12


def router_of(capacity: float | None = None, experts: int = E, **given) -> ExpertChoiceRouter:
    router = ExpertChoiceRouter(dim=D, num_experts=experts, top_k=2, capacity=capacity, **given).double()
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    return router


def routed(router: ExpertChoiceRouter, valid_T: torch.Tensor | None = None, **fields) -> Routing:
    told = RouterContext(positions_T=torch.arange(B * S) % S, valid_T=valid_T, **fields)
    return router.route(tokens(), told)


def tokens() -> torch.Tensor:
    return torch.randn(B * S, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def dense(routing: Routing) -> np.ndarray:
    """Gate weights [T, E], 0 where a token was not taken."""
    weights_TE = np.zeros((len(routing.ids_TK), E))
    for token, (ids, weights) in enumerate(zip(routing.ids_TK.tolist(), routing.weights_TK.tolist())):
        for expert, weight in zip(ids, weights):
            if expert >= 0:
                weights_TE[token, expert] = weight
    return weights_TE


def by_the_paper(router: ExpertChoiceRouter, groups: list[np.ndarray], capacity: float) -> np.ndarray:
    """S = softmax(X W), and every column of S keeps its n c / E largest, in each group by itself."""
    logits_TE = tokens().numpy() @ router.weight.detach().numpy().T
    scores_TE = np.exp(logits_TE) / np.exp(logits_TE).sum(1, keepdims=True)
    kept_TE = np.zeros_like(scores_TE)
    for group in groups:
        most = math.ceil(len(group) * capacity / E)
        for expert in range(E):
            best = group[np.argsort(-scores_TE[group, expert])[:most]]
            kept_TE[best, expert] = scores_TE[best, expert]
    return kept_TE


@pytest.mark.parametrize("capacity", [None, 0.5, 2.5, 8.0])
@pytest.mark.parametrize("group", ["sequence", "batch"])
def test_experts_take_their_best_tokens_as_in_the_paper(capacity, group):
    router, valid_T = router_of(capacity, group=group), torch.arange(B * S) % S < 9
    sequences = [np.arange(S) + S * number for number in range(B)]
    for valid in (None, valid_T):
        found = routed(router, valid)
        groups = [one[valid_T.numpy()[one]] if valid is not None else one for one in sequences]
        groups = groups if group == "sequence" else [np.concatenate(groups)]
        expected_TE = by_the_paper(router, groups, 2 if capacity is None else capacity)
        np.testing.assert_allclose(dense(found), expected_TE, rtol=1e-12)
        most = sum(math.ceil(len(one) * router.capacity / E) for one in groups)
        assert found.stats.counts_E.tolist() == [most] * E and found.max_rows is None


def test_a_token_may_have_no_expert_and_best_experts_come_first():
    found = routed(router_of(0.5))
    assert ((found.ids_TK >= 0).sum(1) == 0).any()
    weights_TK = routed(router_of(4.0)).weights_TK
    assert weights_TK.equal(weights_TK.sort(1, descending=True).values)


def test_one_expert_of_all_tokens_is_dense():
    found = routed(router_of(1.0, experts=1))
    assert not found.ids_TK.any() and found.weights_TK.unique().tolist() == [1]


def test_rounding_does_not_decide_between_equal_tokens():
    """A sequence may begin with one token several times; their scores differ by the order of sums."""
    router = router_of(2.0)
    noise_TD = 1e-13 * torch.randn(S, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    same_TD = tokens()[:1].expand(S, -1)
    told = RouterContext(positions_T=torch.arange(S))
    ids_TK = router.route(same_TD, told).ids_TK
    assert (ids_TK[:3] >= 0).all() and (ids_TK[3:] == -1).all()          # C = 12 * 2 / 8: the first tokens
    assert router.route(same_TD + noise_TD, told).ids_TK.equal(ids_TK)


def test_each_draw_of_a_batch_is_a_group():
    router = router_of(group="batch")
    half = RouterContext(draws=1)
    parts = [router.route(part, half).ids_TK for part in tokens().chunk(2)]
    assert router.route(tokens(), half._replace(draws=2)).ids_TK.equal(torch.cat(parts))


def test_what_depends_on_the_split_says_so():
    assert router_of().depends_on_split == "" != router_of(group="batch").depends_on_split
