"""The router as one op, against the routers' own chains of operators: choice, weights, sums, gradients."""

import pytest
import torch
from torch import Tensor

from moetrain.losses.base import Pooled
from moetrain.losses.load_balance import LoadBalanceLoss
from moetrain.model.activation_checkpointing import recomputed
from moetrain.ops.gating import top_k
from moetrain.ops.router import RouterRule, kernel_takes, route_tokens
from moetrain.routers.base import RouterContext
from moetrain.routers.sigmoid import SigmoidRouter
from moetrain.routers.topk import TopKRouter

SUMS = ("prob_sum_E", "lse2_sum", "entropy_sum")
ROUTERS = {
    "renorm": lambda: TopKRouter(dim=4, num_experts=6, top_k=2),
    "raw, groups": lambda: TopKRouter(dim=4, num_experts=8, top_k=3, weights="raw", scale=4.0, num_groups=4,
                                      topk_groups=2),
    "one expert": lambda: TopKRouter(dim=4, num_experts=1, top_k=1, weights="raw"),
    "sigmoid": lambda: SigmoidRouter(dim=4, num_experts=6, top_k=2, scale=2.5),
    "sigmoid, groups": lambda: SigmoidRouter(dim=4, num_experts=8, top_k=2, weights="raw", num_groups=2,
                                             topk_groups=1),
}


def rule_of(router) -> RouterRule:
    sigmoid = isinstance(router, SigmoidRouter)
    renormalised = router.weights == "renorm" if sigmoid else router.weights != "raw"
    return router.rule(sigmoid=sigmoid, renormalised=renormalised, scale=router.scale)


def everything(routing) -> list[Tensor]:
    return [routing.weights_TK, *(getattr(routing.stats, name) for name in SUMS)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("tokens, padded", [(0, False), (1, False), (17, False), (17, True)])
@pytest.mark.parametrize("name", ROUTERS)
def test_one_op_is_the_chain_of_operators(name, tokens, padded, dtype):
    router = ROUTERS[name]().to(dtype)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        router.weight.copy_(torch.randn(router.weight.shape, generator=generator))
        if isinstance(router, SigmoidRouter):
            router.bias.copy_(torch.randn(router.num_experts, generator=generator) / 4)
    x_TD = torch.randn(tokens, 4, generator=generator).to(dtype)
    valid_T = torch.arange(tokens) % 3 != 1 if padded else None
    context, decisions = RouterContext(valid_T=valid_T), []
    expected = router.route(x_TD, context)
    got = router.route_in_one(router.logits(x_TD), rule_of(router), context._replace(decisions=decisions),
                              getattr(router, "bias", None))

    assert got.ids_TK.equal(expected.ids_TK) and decisions[0].ids_TK.equal(expected.ids_TK)
    assert got.max_rows == expected.max_rows
    for field, value in expected.stats._asdict().items():
        torch.testing.assert_close(getattr(got.stats, field), value, msg=field)
    torch.testing.assert_close(got.weights_TK, expected.weights_TK)

    grads = [torch.randn(value.shape, dtype=dtype, generator=generator) for value in everything(expected)]
    for chosen in (slice(None), slice(0, 1), slice(1, 2), slice(3, 4)):
        ours, theirs = (torch.autograd.grad(everything(routing)[chosen], router.weight, grads[chosen],
                                            retain_graph=True,
                                            allow_unused=True)[0] for routing in (got, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# --- the gradient of a balance loss at the logits


SCORES = pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])
PADDING = pytest.mark.parametrize("valid", [None, [True, True, False, True, False, True]],
                                  ids=["all valid", "padding"])


def logits_of(tokens: int = 6, experts: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(tokens, experts, dtype=torch.float64, generator=generator).requires_grad_()


def mask(valid: list[bool] | None) -> Tensor | None:
    return None if valid is None else torch.tensor(valid)


def slopes_backward(logits_TE: Tensor, slopes_E: Tensor, valid_T: Tensor | None = None, *,
                    sigmoid: bool = False) -> Tensor:
    """The op's gradient at the logits, where nothing comes through weights, lse² or entropy."""
    ids_TK = torch.zeros(len(logits_TE), 1, dtype=torch.int64)
    lse_T = logits_TE.logsumexp(-1)
    return torch.ops.moetrain.router_backward(None, slopes_E, None, None, logits_TE, ids_TK, lse_T, valid_T,
                                              sigmoid, True, 1.0)


@SCORES
@PADDING
@pytest.mark.parametrize("scope", ["global", "micro", "sequence"])
def test_slopes_give_what_autograd_makes_of_a_balance_loss_in_float64(sigmoid, valid, scope):
    valid_T = mask(valid)
    router = (SigmoidRouter if sigmoid else TopKRouter)(dim=5, num_experts=5, top_k=2)
    router.weight.data = torch.eye(5, dtype=torch.float64)                  # so x is the logits
    logits_TE = logits_of()
    offsets = torch.tensor([0, 2, 6]) if scope == "sequence" else None
    stats = router.route(logits_TE, RouterContext(valid_T=valid_T, seq_offsets=offsets)).stats
    loss, pooled = LoadBalanceLoss(scope=scope), Pooled(torch.tensor([40, 0, 9, 30, 1]), torch.tensor(40))
    (truth_TE,) = torch.autograd.grad(loss.value(stats, pooled), logits_TE)
    (slopes,) = loss.slopes(stats, pooled).values()
    cuts = [slice(0, 2), slice(2, 6)] if scope == "sequence" else [slice(0, 6)]
    ours_TE = torch.cat([
        slopes_backward(logits_TE.detach()[cut], slopes_E, None if valid_T is None else valid_T[cut],
                        sigmoid=sigmoid)
        for cut, slopes_E in zip(cuts, slopes.view(-1, 5), strict=True)])
    assert truth_TE.abs().max() > 1e-4
    torch.testing.assert_close(ours_TE, truth_TE, rtol=0, atol=1e-15)


@SCORES
@PADDING
def test_probability_sums_pass_gradcheck_in_float64(sigmoid, valid):
    def prob_sum(logits_TE: Tensor) -> Tensor:
        return route_tokens(logits_TE, RouterRule(2, sigmoid=sigmoid), valid_T=mask(valid)).sums.prob_sum_E

    assert torch.autograd.gradcheck(prob_sum, logits_of())


def test_the_gradient_of_a_token_sums_to_zero_over_experts_in_float64():
    logits_TE, slopes_E = logits_of().detach(), torch.rand(5, dtype=torch.float64)
    ours_TE = slopes_backward(logits_TE, slopes_E)
    by_score_TE = slopes_backward(logits_TE, slopes_E, sigmoid=True) / (1 - logits_TE.sigmoid())
    # A common factor of all sigmoid scores changes nothing.
    for grad_TE in (ours_TE, by_score_TE):
        assert grad_TE.abs().max() > 1e-2 and grad_TE.sum(1).abs().max() < 1e-15


@SCORES
def test_equal_slopes_pull_at_nothing_in_float64(sigmoid):
    """A perfectly even f gives every expert the same slope."""
    slopes_E = torch.full((5,), 0.7, dtype=torch.float64)
    assert slopes_backward(logits_of().detach(), slopes_E, sigmoid=sigmoid).abs().max() < 1e-15


@SCORES
def test_padding_gets_nothing_whatever_it_holds_in_float64(sigmoid):
    logits_TE, slopes_E = logits_of().detach(), torch.rand(5, dtype=torch.float64)
    valid_T = torch.tensor([True, False, True, True, True, True])
    expected_TE = slopes_backward(logits_TE[valid_T], slopes_E, sigmoid=sigmoid)
    logits_TE[1] = torch.nan
    ours_TE = slopes_backward(logits_TE, slopes_E, valid_T, sigmoid=sigmoid)
    assert ours_TE[valid_T].equal(expected_TE) and not ours_TE[1].any()
    sums = route_tokens(logits_TE, RouterRule(2, sigmoid=sigmoid), valid_T=valid_T).sums
    assert sums.prob_sum_E.isfinite().all()


def test_slopes_give_the_formula_of_the_loss_in_float64():
    """dLBL/dz = w E p (f - <p, f>), w = 1 / N."""
    logits_TE = logits_of().detach()
    counts_E = torch.bincount(top_k(logits_TE, 2)[1].flatten(), minlength=5).double()
    f_E, p_TE = counts_E / counts_E.sum(), logits_TE.softmax(-1)
    truth_TE = 5 / 6 * p_TE * (f_E - (p_TE * f_E).sum(1, keepdim=True))
    torch.testing.assert_close(slopes_backward(logits_TE, 5 * f_E / 6), truth_TE)


@pytest.mark.parametrize("padded", [False, True])
@SCORES
def test_slopes_alone_give_the_closed_form(sigmoid, padded):
    """Of a balance loss, with nothing through weights, lse² or entropy: whatever was chosen."""
    generator = torch.Generator().manual_seed(3)
    logits_TE, slopes_E = torch.randn(9, 40, generator=generator) * 3, torch.rand(40, generator=generator)
    valid_T = torch.arange(9) % 4 != 2 if padded else None
    ids_TK = torch.randint(40, (9, 2), generator=generator)
    got = torch.ops.moetrain.router_backward(None, slopes_E, None, None, logits_TE, ids_TK,
                                             logits_TE.logsumexp(-1), valid_T,
                                             sigmoid, True, 2.0)
    scores_TE = logits_TE.sigmoid() if sigmoid else logits_TE.softmax(-1)
    total_T1 = scores_TE.sum(-1, keepdim=True)
    pull_TE = slopes_E - (scores_TE / total_T1 * slopes_E).sum(-1, keepdim=True)
    truth_TE = (scores_TE * (1 - scores_TE) / total_T1 if sigmoid else scores_TE) * pull_TE
    truth_TE = truth_TE if valid_T is None else truth_TE.where(valid_T[:, None], 0)
    torch.testing.assert_close(got, truth_TE, rtol=1e-4, atol=1e-7)


# --- decisions, and the op itself


def test_given_ids_nothing_is_chosen():
    logits_TE = torch.randn(5, 6)
    ids_TK = torch.tensor([[5, 0], [1, -1], [-1, -1], [2, 3], [0, 4]])
    routed = route_tokens(logits_TE, RouterRule(2, renormalised=False), ids_TK=ids_TK)
    assert routed.ids_TK.equal(ids_TK) and routed.sums.counts_E.tolist() == [2, 1, 1, 1, 1, 1]
    expected = logits_TE.softmax(-1).gather(1, ids_TK.clamp(min=0)).where(ids_TK >= 0, 0)
    torch.testing.assert_close(routed.weights_TK, expected)


def test_a_recomputed_block_keeps_the_choice_it_made():
    """Recomputed logits that would choose otherwise, as rounding may make them: the first choice holds."""
    swaps = iter([[0, 1, 2], [1, 0, 2]])

    def block(logits_TE: Tensor) -> Tensor:
        return route_tokens(logits_TE[:, next(swaps)], RouterRule(1, renormalised=False)).weights_TK

    logits_TE = torch.tensor([[3.0, 1.0, 0.0]], requires_grad=True)
    recomputed("full")(block, logits_TE).sum().backward()
    # Expert 0 of the swapped logits.
    (expected,) = torch.autograd.grad(logits_TE[:, [1, 0, 2]].softmax(-1)[0, 0], logits_TE)
    torch.testing.assert_close(logits_TE.grad, expected)


def test_no_kernel_is_asked_for_on_the_cpu_or_beyond_its_bounds():
    from moetrain.ops import extension

    logits_TE = torch.zeros(2, 4)
    assert kernel_takes(logits_TE, RouterRule(2)) == (extension.absent() is None)
    assert not kernel_takes(torch.zeros(2, 1025), RouterRule(2))
    assert not kernel_takes(logits_TE.double(), RouterRule(2))


def test_the_op_is_well_formed():
    valid_T = torch.tensor([True, False, True])
    for bias, ids, valid in ((None, None, None), (torch.randn(6), None, valid_T),
                             (None, torch.tensor([[0], [1], [-1]]), None)):
        arguments = (torch.randn(3, 6, requires_grad=True), bias, ids, valid, 1, bias is not None, True, 1.0,
                     2, 1, True)
        torch.library.opcheck(torch.ops.moetrain.router, arguments)
    ids = torch.tensor([[0, 2], [1, -1], [5, 4]])
    torch.library.opcheck(torch.ops.moetrain.router_backward,
                          (torch.randn(3, 2), torch.randn(6), None, torch.tensor(1.0), torch.randn(3, 6), ids,
                           torch.randn(3), valid_T, True, True, 2.0))


def test_it_is_traced_as_one_graph():
    def loss(logits_TE: Tensor) -> Tensor:
        routed = route_tokens(logits_TE, RouterRule(2))
        return (routed.weights_TK ** 2).sum() + routed.sums.prob_sum_E[0]

    logits_TE = torch.randn(5, 6, requires_grad=True)
    (expected,) = torch.autograd.grad(loss(logits_TE), logits_TE)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    (got,) = torch.autograd.grad(compiled(logits_TE), logits_TE)
    torch.testing.assert_close(got, expected)
