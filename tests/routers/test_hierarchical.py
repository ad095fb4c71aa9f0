"""Two levels of choice: equations in numpy, one group and whole sequences."""

import numpy as np
import pytest
import torch

from moetrain.routers.hierarchical import HierarchicalRouter, mean_of_sequences
from tests.support.any_router import context, router_of, tokens

T = 40


def softmax(z):
    return np.exp(z) / np.exp(z).sum(-1, keepdims=True)


@pytest.mark.parametrize("topk_groups", [1, 2, 4])
def test_the_choice_follows_the_two_gates(topk_groups):
    router = router_of("hierarchical", ["router.num_groups=4", f"router.topk_groups={topk_groups}"], k=2)
    x = tokens(T).numpy()
    groups = softmax(x @ router.group_weight.detach().numpy().T)
    experts = softmax((x @ router.weight.detach().numpy().T).reshape(T, 4, 2))
    probs = groups[:, :, None] * experts
    routing = router.route(tokens(T), context(T))
    for t in range(T):
        kept = np.argsort(-groups[t])[:topk_groups]
        inside = {2 * g + e: probs[t, g, e] for g in kept for e in range(2)}
        chosen = sorted(inside, key=inside.get, reverse=True)[:2]
        assert routing.ids_TK[t].tolist() == chosen
        weights = np.array([inside[e] for e in chosen])
        np.testing.assert_allclose(routing.weights_TK[t].detach().numpy(), weights / weights.sum())
    np.testing.assert_allclose(routing.stats.prob_sum_E.detach().numpy(), probs.reshape(T, 8).sum(0))


def test_one_group_is_topk():
    router, plain = router_of("hierarchical", ["router.num_groups=1"]), router_of("topk", [])
    with torch.no_grad():
        plain.weight.copy_(router.weight)
    ours, its = (each.route(tokens(T), context(T)) for each in (router, plain))
    assert ours.ids_TK.equal(its.ids_TK)
    torch.testing.assert_close(ours.weights_TK, its.weights_TK)


def test_a_sequence_chooses_its_groups_together_whatever_else_is_in_the_batch():
    router = HierarchicalRouter(dim=5, num_experts=8, top_k=2, num_groups=4, unit="sequence").double()
    generator = torch.Generator().manual_seed(0)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    valid_T = torch.arange(T) % 8 != 7                       # sequences of 4 tokens, every second one padded
    whole = router.route(tokens(T), context(T, valid_T=valid_T))
    groups_TK = torch.div(whole.ids_TK, 2, rounding_mode="floor").where(whole.ids_TK >= 0, -1)
    for first in range(0, T, 4):
        rows = slice(first, first + 4)
        assert len(set(groups_TK[rows][valid_T[rows]].flatten().tolist())) == 1
        alone = router.route(tokens(T)[rows], context(4, first, valid_T=valid_T[rows]))
        assert alone.ids_TK.equal(whole.ids_TK[rows])
        torch.testing.assert_close(alone.weights_TK, whole.weights_TK[rows])
    assert not router.causal and len(set(groups_TK.flatten().tolist())) > 2
    assert not router.route(tokens(0), context(0)).ids_TK.numel()


def test_two_draws_of_a_sequence_are_two_sequences():
    values_TG = torch.arange(8.0)[:, None]
    told = context(8)._replace(sample_ids_T=torch.zeros(8, dtype=torch.int64))
    assert mean_of_sequences(values_TG, told)[:, 0].tolist() == [1.5] * 4 + [5.5] * 4
