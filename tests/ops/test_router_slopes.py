"""The closed-form gradient of a balance loss at the logits: what autograd finds, and what finite differences find."""

import pytest
import torch
from torch import Tensor

from moetrain.losses.base import Pooled
from moetrain.losses.load_balance import LoadBalanceLoss
from moetrain.ops.gating import top_k
from moetrain.ops.router_slopes import prob_sum, router_slopes
from moetrain.routers.base import RouterContext
from moetrain.routers.sigmoid import SigmoidRouter
from moetrain.routers.topk import TopKRouter

ROUTERS = {False: TopKRouter, True: SigmoidRouter}
SCORES = pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])
PADDING = pytest.mark.parametrize("valid", [None, [True, True, False, True, False, True]], ids=["all valid", "padding"])


def logits_of(tokens: int = 6, experts: int = 5) -> Tensor:
    return torch.randn(tokens, experts, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()


def mask(valid: list[bool] | None) -> Tensor | None:
    return None if valid is None else torch.tensor(valid)


@SCORES
@PADDING
@pytest.mark.parametrize("scope", ["global", "micro", "sequence"])
def test_it_is_what_autograd_makes_of_the_loss_of_a_router(sigmoid, valid, scope):
    valid_T = mask(valid)
    router = ROUTERS[sigmoid](dim=5, num_experts=5, top_k=2)
    router.weight.data = torch.eye(5, dtype=torch.float64)                  # so x is the logits
    logits_TE = logits_of()
    offsets = torch.tensor([0, 2, 6]) if scope == "sequence" else None
    stats = router.route(logits_TE, RouterContext(valid_T=valid_T, seq_offsets=offsets)).stats
    loss, pooled = LoadBalanceLoss(scope=scope), Pooled(torch.tensor([40, 0, 9, 30, 1]), torch.tensor(40))
    (truth_TE,) = torch.autograd.grad(loss.value(stats, pooled), logits_TE)
    (slopes,) = loss.slopes(stats, pooled).values()
    if scope == "sequence":
        slopes = slopes.repeat_interleave(offsets.diff(), 0)
    ours_TE = router_slopes(logits_TE.detach(), slopes, valid_T, sigmoid=sigmoid)
    assert truth_TE.abs().max() > 1e-4
    torch.testing.assert_close(ours_TE, truth_TE, rtol=0, atol=1e-15)


@SCORES
@PADDING
def test_finite_differences_agree(sigmoid, valid):
    assert torch.autograd.gradcheck(lambda z: prob_sum(z, mask(valid), sigmoid=sigmoid), logits_of())


@SCORES
@PADDING
def test_both_are_proper_ops(sigmoid, valid):
    logits_TE, slopes_E = logits_of(), torch.rand(5, dtype=torch.float64)
    torch.library.opcheck(torch.ops.moetrain.prob_sum.default, (logits_TE, mask(valid), sigmoid))
    torch.library.opcheck(torch.ops.moetrain.router_slopes.default, (logits_TE.detach(), slopes_E, mask(valid), sigmoid))


def test_the_gradient_of_a_token_sums_to_zero_over_experts():
    logits_TE, slopes_E = logits_of().detach(), torch.rand(5, dtype=torch.float64)
    ours_TE = router_slopes(logits_TE, slopes_E)
    by_score_TE = router_slopes(logits_TE, slopes_E, sigmoid=True) / (1 - logits_TE.sigmoid())
    for grad_TE in (ours_TE, by_score_TE):               # a common factor of all sigmoid scores changes nothing
        assert grad_TE.abs().max() > 1e-2 and grad_TE.sum(1).abs().max() < 1e-15


@SCORES
def test_equal_slopes_pull_at_nothing(sigmoid):
    """A perfectly even f gives every expert the same slope."""
    assert router_slopes(logits_of().detach(), torch.full((5,), 0.7, dtype=torch.float64), sigmoid=sigmoid).abs().max() < 1e-15


@SCORES
def test_padding_gets_nothing_whatever_it_holds(sigmoid):
    logits_TE, slopes_E = logits_of().detach(), torch.rand(5, dtype=torch.float64)
    valid_T = torch.tensor([True, False, True, True, True, True])
    expected_TE = router_slopes(logits_TE[valid_T], slopes_E, sigmoid=sigmoid)
    logits_TE[1] = torch.nan
    ours_TE = router_slopes(logits_TE, slopes_E, valid_T, sigmoid=sigmoid)
    assert ours_TE[valid_T].equal(expected_TE) and not ours_TE[1].any()
    assert prob_sum(logits_TE, valid_T, sigmoid=sigmoid).isfinite().all()


def test_it_is_the_formula_of_the_loss():
    """dLBL/dz = w E p (f - <p, f>), w = 1 / N."""
    logits_TE = logits_of().detach()
    counts_E = torch.bincount(top_k(logits_TE, 2)[1].flatten(), minlength=5).double()
    f_E, p_TE = counts_E / counts_E.sum(), logits_TE.softmax(-1)
    truth_TE = 5 / 6 * p_TE * (f_E - (p_TE * f_E).sum(1, keepdim=True))
    torch.testing.assert_close(router_slopes(logits_TE, 5 * f_E / 6), truth_TE)
