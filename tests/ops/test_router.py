"""The router as one op against the routers' own chain of operators: choice, weights, sums, and every gradient."""

import pytest
import torch
from torch import Tensor

from moetrain.model.activation_checkpointing import recomputed
from moetrain.ops.router import RouterRule, kernel_takes, route_tokens
from moetrain.ops.router_slopes import router_slopes
from moetrain.routers.base import RouterContext
from moetrain.routers.sigmoid import SigmoidRouter
from moetrain.routers.topk import TopKRouter

SUMS = ("prob_sum_E", "lse2_sum", "entropy_sum")
ROUTERS = {
    "renorm": lambda: TopKRouter(dim=4, num_experts=6, top_k=2),
    "raw, groups": lambda: TopKRouter(dim=4, num_experts=8, top_k=3, weights="raw", scale=4.0, num_groups=4, topk_groups=2),
    "one expert": lambda: TopKRouter(dim=4, num_experts=1, top_k=1, weights="raw"),
    "sigmoid": lambda: SigmoidRouter(dim=4, num_experts=6, top_k=2, scale=2.5),
    "sigmoid, groups": lambda: SigmoidRouter(dim=4, num_experts=8, top_k=2, weights="raw", num_groups=2, topk_groups=1),
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
        ours, theirs = (torch.autograd.grad(everything(routing)[chosen], router.weight, grads[chosen], retain_graph=True,
                                            allow_unused=True)[0] for routing in (got, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])
def test_slopes_alone_give_the_closed_form(sigmoid, padded):
    """Of a balance loss, with nothing through weights, lse² or entropy: whatever was chosen."""
    generator = torch.Generator().manual_seed(3)
    logits_TE, slopes_E = torch.randn(9, 40, generator=generator) * 3, torch.rand(40, generator=generator)
    valid_T = torch.arange(9) % 4 != 2 if padded else None
    ids_TK = torch.randint(40, (9, 2), generator=generator)
    got = torch.ops.moetrain.router_backward(None, slopes_E, None, None, logits_TE, ids_TK, logits_TE.logsumexp(-1), valid_T,
                                             sigmoid, True, 2.0)
    torch.testing.assert_close(got, router_slopes(logits_TE, slopes_E, valid_T, sigmoid=sigmoid), rtol=1e-4, atol=1e-7)


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
    (expected,) = torch.autograd.grad(logits_TE[:, [1, 0, 2]].softmax(-1)[0, 0], logits_TE)     # expert 0 of the swapped logits
    torch.testing.assert_close(logits_TE.grad, expected)


def test_no_kernel_is_asked_for_on_the_cpu_or_beyond_its_bounds():
    from moetrain.ops import extension

    logits_TE = torch.zeros(2, 4)
    assert kernel_takes(logits_TE, RouterRule(2)) == (extension.absent() is None)
    assert not kernel_takes(torch.zeros(2, 1025), RouterRule(2)) and not kernel_takes(logits_TE.double(), RouterRule(2))


def test_the_op_is_well_formed():
    valid_T = torch.tensor([True, False, True])
    for bias, ids, valid in ((None, None, None), (torch.randn(6), None, valid_T), (None, torch.tensor([[0], [1], [-1]]), None)):
        arguments = (torch.randn(3, 6, requires_grad=True), bias, ids, valid, 1, bias is not None, True, 1.0, 2, 1, True)
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
    (got,) = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(logits_TE), logits_TE)
    torch.testing.assert_close(got, expected)
