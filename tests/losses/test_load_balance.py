"""The balance loss: known values, its gradient, and its independence of how a batch is split."""

import pytest
import torch
from torch import Tensor

from moetrain.losses.base import Pooled
from moetrain.losses.load_balance import LoadBalanceLoss
from moetrain.ops.gating import top_k
from moetrain.ops.router_sums import RouterSums, router_sums

GLOBAL, MICRO = LoadBalanceLoss(scope="global"), LoadBalanceLoss(scope="micro")


def stats_of(probs_TE: Tensor, k: int = 1) -> RouterSums:
    return router_sums(probs_TE, probs_TE.log(), top_k(probs_TE, k)[1], None)


def pool(*parts: RouterSums) -> Pooled:
    return Pooled(sum(part.counts_E for part in parts), sum(part.tokens for part in parts))


def loss_of(probs: list[list[float]] | Tensor, k: int = 1) -> float:
    stats = stats_of(torch.as_tensor(probs, dtype=torch.float64), k)
    return GLOBAL.value(stats, pool(stats)).item()


@pytest.mark.parametrize("k", [1, 3])
def test_uniform_probabilities_give_one_wherever_the_ties_go(k):
    assert loss_of(torch.full((5, 8), 1 / 8), k) == pytest.approx(1)


@pytest.mark.parametrize("experts", [2, 8])
def test_certainty_about_one_expert_gives_their_number(experts):
    assert loss_of(torch.eye(experts)[[1] * 4]) == pytest.approx(experts)


def test_certainty_spread_evenly_gives_one():
    assert loss_of(torch.eye(4)) == pytest.approx(1)


def test_it_can_be_below_one():
    # f = (2/3, 1/3), P = (1.03, 1.97) / 3
    loss = loss_of([[.51, .49], [.51, .49], [.01, .99]])
    assert loss == pytest.approx(2 * (2 * 1.03 + 1.97) / 9) == pytest.approx(.8956, abs=1e-4)


@pytest.mark.parametrize("loss", [GLOBAL, MICRO], ids=["global", "micro"])
def test_the_gradient_at_the_logits_sums_to_zero_over_experts(loss):
    logits_TE = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    stats = stats_of(logits_TE.softmax(-1), 2)
    (grad_TE,) = torch.autograd.grad(loss.value(stats, pool(stats)), logits_TE)
    assert grad_TE.abs().max() > 1e-3
    torch.testing.assert_close(grad_TE.sum(1), torch.zeros(7, dtype=torch.float64), rtol=0, atol=1e-15)


def test_contributions_of_any_split_add_up_in_value_and_gradient():
    logits_TE = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    probs_TE = logits_TE.softmax(-1)
    whole = stats_of(probs_TE, 2)
    value = GLOBAL.value(whole, pool(whole))
    (truth_TE,) = torch.autograd.grad(value, logits_TE, retain_graph=True)
    for sizes in ([9], [4, 5], [1, 0, 8]):
        parts = [stats_of(part, 2) for part in probs_TE.split(sizes)]
        total = sum(GLOBAL.value(part, pool(*parts)) for part in parts)
        torch.testing.assert_close(total, value)
        torch.testing.assert_close(torch.autograd.grad(total, logits_TE, retain_graph=True)[0], truth_TE)


def test_micro_scope_punishes_a_skewed_part_that_global_scope_forgives():
    parts = [stats_of(torch.eye(2)[[expert] * 3]) for expert in (0, 1)]
    assert sum(GLOBAL.value(part, pool(*parts)) for part in parts).item() == pytest.approx(1)
    assert sum(MICRO.value(part, pool(*parts)) for part in parts).item() == pytest.approx(2)


@pytest.mark.parametrize("loss", [GLOBAL, MICRO], ids=["global", "micro"])
def test_slopes_are_the_gradient_of_the_value(loss):
    stats = stats_of(torch.rand(6, 4, dtype=torch.float64).softmax(-1), 2)
    stats = stats._replace(prob_sum_E=stats.prob_sum_E.detach().requires_grad_())
    pooled = Pooled(torch.tensor([5, 0, 9, 1]), torch.tensor(11))
    (truth_E,) = torch.autograd.grad(loss.value(stats, pooled), stats.prob_sum_E)
    slopes = loss.slopes(stats, pooled)
    assert set(slopes) == {"prob_sum_E"}
    assert slopes["prob_sum_E"].equal(truth_E) and not slopes["prob_sum_E"].requires_grad


def test_counts_get_no_gradient():
    stats = stats_of(torch.rand(6, 4).softmax(-1).requires_grad_())
    assert stats.counts_E.dtype == torch.int64 and not stats.counts_E.requires_grad
    assert not GLOBAL.slopes(stats, pool(stats))["prob_sum_E"].requires_grad


@pytest.mark.parametrize("loss", [GLOBAL, MICRO], ids=["global", "micro"])
def test_nothing_routed_is_zero_and_finite(loss):
    probs_TE = torch.rand(0, 4, requires_grad=True)
    stats = stats_of(probs_TE)
    value = loss.value(stats, pool(stats))
    assert value.item() == 0 and torch.autograd.grad(value, probs_TE)[0].shape == (0, 4)


def test_counts_beyond_float32_keep_their_share():
    counts_E = torch.tensor([2**25 + 1, 2**25 + 1])
    slope_E = GLOBAL.slopes(stats_of(torch.full((1, 2), .5)), Pooled(counts_E, counts_E.sum()))["prob_sum_E"]
    torch.testing.assert_close(slope_E * counts_E.sum(), torch.ones(2))


def test_only_a_weighted_loss_over_ranks_wants_counts_pooled():
    wants = [LoadBalanceLoss(weight=w, scope=s, mode=m).pool for w, s, m in (
        (1, "global", "exact"), (1, "node", "buffer"), (0, "global", "exact"), (1, "micro", "exact"),
        (1, "sequence", "exact"))]
    assert wants == [("global", "exact"), ("node", "buffer"), None, None, None]


# --- sequences, and the conventions of others


def by_sequence(probs_TE: Tensor, lengths: list[int], k: int = 2) -> RouterSums:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    ids_TK = top_k(probs_TE, k)[1]
    return router_sums(probs_TE, probs_TE.log(), ids_TK, None, offsets)


@pytest.mark.parametrize("lengths", [[9], [4, 5], [1, 0, 8]], ids=str)
def test_a_sequence_is_balanced_by_itself_whatever_it_travels_with(lengths):
    logits_TE = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    probs_TE = logits_TE.softmax(-1)
    loss, tokens = LoadBalanceLoss(scope="sequence"), torch.tensor(9)
    value = loss.value(by_sequence(probs_TE, lengths), Pooled(torch.zeros(4), tokens))
    alone = [MICRO.value(stats_of(part, 2), Pooled(torch.zeros(4), tokens))
             for part in probs_TE.split(lengths)]
    torch.testing.assert_close(value, sum(alone))
    torch.testing.assert_close(*(torch.autograd.grad(v, logits_TE, retain_graph=True)
                                 for v in (value, sum(alone))))


def test_padding_and_unused_slots_count_in_no_sequence():
    probs_TE = torch.rand(6, 4, dtype=torch.float64).softmax(-1)
    ids_TK = torch.tensor([[0, 1], [2, -1], [-1, -1], [3, 0], [1, 2], [-1, -1]])
    valid_T = torch.tensor([True, True, False, True, True, False])
    stats = router_sums(probs_TE, probs_TE.log(), ids_TK, valid_T, torch.tensor([0, 3, 6]))
    assert stats.counts_SE.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert stats.counts_SE.sum(0).equal(stats.counts_E)
    torch.testing.assert_close(stats.prob_sum_SE, torch.stack([probs_TE[:2].sum(0), probs_TE[3:5].sum(0)]))


def test_conventions_of_others_differ_by_their_factor():
    """As their code writes them, from published formulas: Megatron perfect = 1, Hugging Face perfect = k."""
    probs_TE, k = torch.rand(20, 8, dtype=torch.float64).softmax(-1), 3
    stats = stats_of(probs_TE, k)
    chosen_TE = torch.zeros(20, 8, dtype=torch.float64).scatter(1, top_k(probs_TE, k)[1], 1)
    megatron = (probs_TE.sum(0) * chosen_TE.sum(0)).sum() * 8 / (20 * 20 * k)
    hugging_face = 8 * (chosen_TE.mean(0) * probs_TE.mean(0)).sum()
    for name, truth in (("one", megatron), ("megatron", megatron), ("huggingface", hugging_face)):
        for scope in ("global", "micro"):
            loss = LoadBalanceLoss(scope=scope, normalization=name)
            torch.testing.assert_close(loss.value(stats, pool(stats)), truth)


def test_slots_of_a_token_that_differ_are_counted_over_the_whole_step():
    """normalization=huggingface is the mean number of slots times ours: of the step, not of a micro-batch."""
    probs_TE = torch.rand(10, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).softmax(-1)
    ids_TK = top_k(probs_TE, 3)[1]
    ids_TK[:5, 1:] = -1                                      # the first tokens take one expert, the others 3
    loss = LoadBalanceLoss(scope="global", normalization="huggingface")
    whole, *parts = (router_sums(probs_TE[part], probs_TE[part].log(), ids_TK[part], None)
                     for part in (slice(10), slice(5), slice(5, 10)))
    pooled = pool(*parts)
    total = sum(loss.value(part, pooled) for part in parts)
    assert total.item() == pytest.approx(loss.value(whole, pooled).item())
    assert total.item() == pytest.approx(2 * GLOBAL.value(whole, pooled).item())
