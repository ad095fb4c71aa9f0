"""A token stays inside its best groups of experts, with any router and however negative the scores are."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from torch import Tensor

from moetrain.config.compose import compose
from moetrain.ops.gating import keep_best_groups, top_k
from moetrain.routers.base import RouterContext
from moetrain.routers.groups import GroupLimitedRouter
from moetrain.routers.sigmoid import SigmoidRouter
from moetrain.routers.topk import TopKRouter

CONTEXT = RouterContext()


def chosen_by_hand(row: list[float], k: int, num_groups: int, topk_groups: int, summed: int) -> list[int]:
    """Loop over Python lists: the best groups by the sum of their best scores, then their best experts."""
    size = len(row) // num_groups
    worth = [sum(sorted(row[g * size:(g + 1) * size])[-summed:]) for g in range(num_groups)]
    kept = sorted(range(num_groups), key=lambda g: (-worth[g], g))[:topk_groups]
    return sorted((e for e in range(len(row)) if e // size in kept), key=lambda e: (-row[e], e))[:k]


class Limits(NamedTuple):
    """Sizes of a router, and a seed for its scores."""

    experts: int
    k: int
    num_groups: int
    topk_groups: int
    seed: int = 0


@st.composite
def limits(draw) -> Limits:
    num_groups, size = draw(st.integers(1, 8)), draw(st.integers(1, 6))
    topk_groups = draw(st.integers(1, num_groups))
    k = draw(st.integers(1, topk_groups * size))
    return Limits(num_groups * size, k, num_groups, topk_groups, draw(st.integers(0, 2**31)))


@pytest.mark.parametrize("score, summed", [("top2", 2), ("max", 1)])
@pytest.mark.parametrize("ties", [False, True])
@given(limits())
@example(Limits(16, 8, 4, 2))                            # all experts of the kept groups
@example(Limits(8, 3, 8, 3))                             # groups of one
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
def test_the_choice_is_that_of_a_loop(score, summed, ties, sizes):
    experts, k, num_groups, topk_groups, seed = sizes
    generator = torch.Generator().manual_seed(seed)
    scores_TE = torch.randn(20, experts, dtype=torch.float64, generator=generator)
    scores_TE = (scores_TE * 2).round() if ties else scores_TE
    router = GroupLimitedRouter(dim=1, num_experts=experts, top_k=k, num_groups=num_groups,
                                topk_groups=topk_groups, group_score=score)
    expected = [chosen_by_hand(row, k, num_groups, topk_groups, summed) for row in scores_TE.tolist()]
    assert router.choose(scores_TE, CONTEXT).tolist() == expected
    assert router.choose(scores_TE[:0], CONTEXT).shape == (0, k)


def span(ids_TK: Tensor, size: int) -> int:
    return max(len(set(row)) for row in (ids_TK // size).tolist())


@pytest.mark.parametrize("shift", [0.0, -3.0])
@pytest.mark.parametrize("score", ["top2", "max"])
def test_no_token_leaves_its_groups(score, shift):
    """DeepSeek-V3's shape. Where biased scores are negative, a mask of 0 would outrank them."""
    router = SigmoidRouter(dim=4, num_experts=256, top_k=8, num_groups=8, topk_groups=4, group_score=score)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        router.weight.copy_(torch.randn(256, 4, generator=generator))
        router.bias.copy_(0.6 * torch.randn(256, generator=generator) + shift)
    x_TD = torch.randn(300, 4, generator=generator)
    ids_TK = router.route(x_TD, CONTEXT).ids_TK
    assert span(ids_TK, 32) <= 4
    assert all(len(set(row)) == 8 for row in ids_TK.tolist())
    scores_TGe = (router.logits(x_TD).sigmoid() + router.bias).unflatten(1, (8, 32)).sort(-1).values
    worth_TG = scores_TGe[..., -1] if score == "max" else scores_TGe[..., -1] + scores_TGe[..., -2]
    for chosen, worth in zip((ids_TK // 32).tolist(), worth_TG.tolist()):
        assert set(chosen) <= set(sorted(range(8), key=lambda g: (-worth[g], g))[:4])


def test_a_limit_is_felt():
    scores_TE = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    assert span(top_k(scores_TE, 4)[1], 4) == 4
    assert span(top_k(keep_best_groups(scores_TE, 4, 2, "max"), 4)[1], 4) == 2


def test_softmax_weights_of_deepseek_v2():
    """6 of 160 experts in 3 of 8 groups; raw probabilities times 16; the statistics know no groups."""
    router = TopKRouter(dim=5, num_experts=160, top_k=6, weights="raw", scale=16.0, num_groups=8,
                        topk_groups=3).double()
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(router.weight, generator=generator)
    x_TD = torch.randn(40, 5, dtype=torch.float64, generator=generator).requires_grad_()
    routing = router.route(x_TD, CONTEXT)
    probs_TE = (x_TD @ router.weight.T).softmax(-1)
    expected = torch.tensor([chosen_by_hand(row, 6, 8, 3, 1) for row in probs_TE.tolist()])
    assert routing.ids_TK.equal(expected) and not expected.equal(probs_TE.topk(6).indices)
    torch.testing.assert_close(routing.weights_TK, 16 * probs_TE.gather(1, expected))
    torch.testing.assert_close(routing.stats.prob_sum_E, probs_TE.sum(0))
    ours, truth = (torch.autograd.grad(w.square().sum(), router.weight, retain_graph=True)
                   for w in (routing.weights_TK, 16 * probs_TE.gather(1, expected)))
    torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("model", ["deepseek_v2", "deepseek_v2_lite", "deepseek_v3"])
def test_the_router_that_a_model_brings_fits_it(model):
    config = compose([f"model={model}"])
    groups = config.router["num_groups"], config.router["topk_groups"]
    assert groups == {"deepseek_v2": (8, 3), "deepseek_v2_lite": (1, 1), "deepseek_v3": (8, 4)}[model]


@pytest.mark.parametrize("weights, total", [("renorm", 2.5), ("softmax_of_topk", 2.5)])
def test_scaled_weights_add_up_to_the_scale(weights, total):
    router = TopKRouter(dim=5, num_experts=8, top_k=3, weights=weights, scale=2.5)
    torch.nn.init.normal_(router.weight)
    weights_TK = router.route(torch.randn(9, 5), CONTEXT).weights_TK
    torch.testing.assert_close(weights_TK.sum(1), torch.full((9,), total))
