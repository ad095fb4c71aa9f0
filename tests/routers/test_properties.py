"""What every router of conf/router/ promises, whatever it routes by."""

import pytest
import torch
from torch import Tensor

from moetrain.config.groups import group_options
from moetrain.routers.base import Router, Routing
from tests.support.any_router import E, context, every_router, router_of, tokens


@every_router
def test_a_decision_is_well_formed(option, overrides):
    router = router_of(option, overrides)
    for count in (0, 1, 40):
        routing = router.route(tokens(count), context(count))
        ids_TK, weights_TK = routing.ids_TK, routing.weights_TK
        assert ids_TK.shape == weights_TK.shape == (count, router.max_slots()) and ids_TK.dtype == torch.int64
        assert ((ids_TK >= -1) & (ids_TK < E)).all()
        assert weights_TK.isfinite().all() and weights_TK.dtype == torch.float64
        assert not weights_TK[ids_TK < 0].any() and (ids_TK >= 0).sum() <= routing.max_rows
        for row in ids_TK.tolist():
            used = [expert for expert in row if expert >= 0]
            assert row[:len(used)] == used and len(set(used)) == len(used)
        assert routing.stats.counts_E.sum() == routing.stats.active_sum == (ids_TK >= 0).sum()
        assert routing.stats.dropped == 0


@every_router
def test_a_token_alone_decides_as_in_a_batch_and_sums_add_up(option, overrides):
    router = router_of(option, overrides)
    x_TD = tokens(12)
    together = router.route(x_TD, context(12))
    parts = [router.route(x_TD[i:i + 4], context(4, i)) for i in (0, 4, 8)]
    singles = [router.route(x_TD[i:i + 1], context(1, i)) for i in range(12)]
    for pieces in (parts, singles):
        assert torch.cat([piece.ids_TK for piece in pieces]).equal(together.ids_TK)
        torch.testing.assert_close(torch.cat([piece.weights_TK for piece in pieces]), together.weights_TK)
        totals = {name: total for name, total in together.stats._asdict().items() if total is not None}
        for name, total in totals.items():
            torch.testing.assert_close(sum(getattr(piece.stats, name) for piece in pieces), total, msg=name)


@every_router
def test_padding_of_any_content_leaves_no_trace(option, overrides):
    router, x_TD = router_of(option, overrides), tokens(8)
    valid_T = torch.arange(8) % 4 < 3
    x_TD[~valid_T] = 1e300
    padded = router.route(x_TD, context(8, valid_T=valid_T))
    clean = router.route(x_TD.where(valid_T[:, None], 0), context(8, valid_T=valid_T))
    assert (padded.ids_TK[~valid_T] == -1).all() and padded.ids_TK.equal(clean.ids_TK)
    for ours, its in zip(padded.stats, clean.stats):
        torch.testing.assert_close(ours, its)


@pytest.mark.parametrize("option", group_options()["router"])
def test_experts_may_be_named_in_any_order(option):
    """Without groups, which are sets of consecutive ids."""
    router, renamed = router_of(option, []), router_of(option, [])
    order = torch.randperm(E, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for ours, its in zip((*renamed.parameters(), *renamed.buffers()),
                             (*router.parameters(), *router.buffers())):
            ours.copy_(its[order])
    ours, its = renamed.route(tokens(20), context(20)), router.route(tokens(20), context(20))
    assert order[ours.ids_TK].equal(its.ids_TK)
    torch.testing.assert_close(ours.weights_TK, its.weights_TK)


@every_router
def test_gradients_are_those_of_finite_differences(option, overrides):
    router, x_TD = router_of(option, overrides), tokens(3).requires_grad_()

    def outputs(x_TD: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        routing: Routing = torch.func.functional_call(_Route(router), {"router.weight": weight}, (x_TD,))
        return routing.weights_TK, routing.stats.prob_sum_E, routing.stats.lse2_sum, routing.stats.entropy_sum

    assert torch.autograd.gradcheck(outputs, (x_TD, router.weight.detach().clone().requires_grad_()))


class _Route(torch.nn.Module):
    def __init__(self, router: Router) -> None:
        super().__init__()
        self.router = router

    def forward(self, x_TD: Tensor) -> Routing:
        return self.router.route(x_TD, context(len(x_TD)))
