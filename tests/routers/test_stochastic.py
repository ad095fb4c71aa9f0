"""Random experts: who shares a draw, and what a draw depends on."""

import numpy as np
import pytest
import torch

from moetrain.routers.base import RouterContext
from moetrain.routers.stochastic import StochasticRouter

E, B, S = 4, 5, 6


def context(first: int = 0, count: int = B, **fields) -> RouterContext:
    samples_T = torch.arange(first, first + count).repeat_interleave(S)
    return RouterContext(step=1, router="layers.0.moe", sample_ids_T=samples_T,
                         positions_T=torch.arange(S).repeat(count))._replace(**fields)


def chosen(granularity: str, told: RouterContext, k: int = 1) -> np.ndarray:
    """Experts [B, S, K]."""
    router = StochasticRouter(num_experts=E, top_k=k, granularity=granularity)
    routing = router.route(torch.zeros(len(told.sample_ids_T), 3), told)
    assert (routing.weights_TK == 1 / k).all()
    return routing.ids_TK.numpy().reshape(-1, S, k)


def test_tokens_share_a_draw_as_the_granularity_says():
    """The authors': one expert for a batch in training, for a token or a sentence in inference."""
    told = context(count=40)
    batch, sequence, token = (chosen(name, told)[..., 0] for name in ("batch", "sequence", "token"))
    assert len(np.unique(batch)) == 1
    assert (sequence == sequence[:, :1]).all() and len(np.unique(sequence)) == E
    assert (token != token[:, :1]).any(1).all()


@pytest.mark.parametrize("granularity", ["sequence", "token", "batch"])
def test_the_two_passes_of_a_batch_draw_by_themselves_and_alike_again(granularity):
    once = context(count=B)
    twice = context()._replace(draws=2, sample_ids_T=once.sample_ids_T.repeat(2),
                               positions_T=once.positions_T.repeat(2))
    draws = [chosen(granularity, twice._replace(step=step)) for step in range(8)]
    first, second = np.array(draws)[:, :B], np.array(draws)[:, B:]
    assert (first != second).any() and (first[0] != first[1:]).any()         # another draw, another step
    assert (chosen(granularity, once._replace(step=3)) == first[3]).all()    # the first draw is the only one
    assert (chosen(granularity, twice._replace(step=3)) == draws[3]).all()


def test_a_sequence_draws_alike_in_any_batch_and_at_any_position():
    whole, alone = chosen("sequence", context()), chosen("sequence", context(3, 1))
    assert (whole[3] == alone[0]).all()
    later = context(3, 1, positions_T=torch.arange(S) + 17)                  # behind a cache, in generation
    assert (chosen("sequence", later) == alone).all()


@pytest.mark.parametrize("k", [1, 3])
def test_experts_are_alike_likely_and_different(k):
    found = chosen("token", context(count=1000), k)
    shares_E = np.bincount(found.flatten(), minlength=E) / found.size
    assert np.abs(shares_E - 1 / E).max() < 4 * (3 / 16 / found.size) ** 0.5     # 4 standard deviations
    assert (np.sort(found, axis=-1)[..., 1:] > np.sort(found, axis=-1)[..., :-1]).all()


def test_what_depends_on_the_split_says_so():
    says = [StochasticRouter(num_experts=E, top_k=1, granularity=name).depends_on_split
            for name in ("sequence", "token", "batch")]
    assert says == ["", "", "ranks, accumulation"]
