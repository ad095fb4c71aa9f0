"""Edits of decisions: masked and forced experts, other ranks, other weights, for all tokens or some."""

import pytest
import torch
from torch import Tensor

from moetrain.ops.start import Start
from moetrain.routers.base import Router, RouterContext, Routing, Scores
from moetrain.routers.edits import Edit, RoutingEdits
from moetrain.routers.sigmoid import SigmoidRouter
from moetrain.routers.topk import TopKRouter
from tests.support.any_router import (
    D,
    E,
    K,
    chosen_routers,
    context,
    every_router,
    router_of,
    takes_k_experts,
    tokens,
)

NAME, T = "layers.0.moe", 40
every_router_of_k_experts = chosen_routers(takes_k_experts)


def routed(router: Router, edits: RoutingEdits | None = None, **fields) -> Routing:
    named = {} if edits is None else {"edits": {NAME: edits, "other": RoutingEdits(ids=Edit(torch.neg))}}
    return router.route(tokens(T), context(T, training=False, **named, **fields))


def set_score(expert: int, value: float) -> Edit:
    columns_E = torch.arange(E) == expert
    return Edit(lambda scores_TC: scores_TC.where(~columns_E, value))


@every_router
def test_edits_of_nothing_and_of_other_routers_change_no_bit(option, overrides):
    router = router_of(option, overrides)
    plain = routed(router)
    same = RoutingEdits(Edit(torch.clone), Edit(torch.clone), Edit(lambda weights, ids: 1 * weights))
    if router.scores(tokens(1), context(1)).order_TC is None:
        same = same._replace(scores=None)
    for edits in (RoutingEdits(), same):
        ours = routed(router, edits)
        assert ours.ids_TK.equal(plain.ids_TK) and ours.weights_TK.equal(plain.weights_TK)
        assert all(total.equal(plain.stats.named()[name]) for name, total in ours.stats.named().items())


@chosen_routers(lambda router: router.num_choices == E
                and router.scores(tokens(1), context(1)).order_TC is not None)
def test_a_masked_expert_is_never_chosen(option, overrides):
    found = routed(router_of(option, overrides), RoutingEdits(scores=set_score(2, float("-inf"))))
    assert not (found.ids_TK == 2).any() and found.stats.counts_E[2] == 0
    assert (found.ids_TK >= 0).any() and found.weights_TK.isfinite().all()


@every_router_of_k_experts
def test_the_successor_by_score_takes_the_place_of_a_masked_expert(option, overrides):
    wide, router = router_of(option, overrides, k=K + 1), router_of(option, overrides)
    plain, masked = routed(wide).ids_TK, routed(router, RoutingEdits(scores=set_score(2, float("-inf"))))
    assert not (masked.ids_TK == 2).any() and masked.stats.counts_E[2] == 0
    if not overrides:                                    # without groups, whose choice the mask may change
        for row, found in zip(plain.tolist(), masked.ids_TK.tolist()):
            assert found == [expert for expert in row if expert != 2][:K]
    assert (masked.weights_TK > 0).all() and masked.weights_TK.isfinite().all()


@every_router_of_k_experts
def test_a_forced_expert_is_chosen_first_and_weighs_as_the_router_says(option, overrides):
    router = router_of(option, overrides)
    forced = routed(router, RoutingEdits(scores=set_score(5, float("inf"))))
    assert (forced.ids_TK[:, 0] == 5).all() and (forced.weights_TK > 0).all()
    plain, chosen_T = routed(router), (routed(router).ids_TK == 5).any(1)
    if not overrides:
        assert chosen_T.any()
        torch.testing.assert_close(forced.weights_TK[chosen_T].sort(1).values,
                                   plain.weights_TK[chosen_T].sort(1).values)


@every_router_of_k_experts
def test_fewer_choices_than_slots_leave_slots_unused(option, overrides):
    def all_but_two(scores_TC: Tensor) -> Tensor:
        return scores_TC.where(torch.arange(E) < 2, float("-inf"))

    found = routed(router_of(option, overrides), RoutingEdits(scores=Edit(all_but_two)))
    assert (found.ids_TK.sort(1).values == torch.tensor([-1, 0, 1])).all()
    assert (found.ids_TK[:, 2] == -1).all() and not found.weights_TK[:, 2].any()
    assert found.stats.active_sum == 2 * T


@every_router_of_k_experts
def test_ranks_of_a_sorted_choice_and_weights_of_some_rows(option, overrides):
    router, rows_T = router_of(option, overrides), torch.arange(T) % 3 == 0
    plain = routed(router)
    second = routed(router, RoutingEdits(ids=Edit(lambda ids: ids.where(torch.arange(K) == 1, -1), rows_T)))
    assert second.ids_TK[~rows_T].equal(plain.ids_TK[~rows_T])
    assert second.ids_TK[rows_T, 0].equal(plain.ids_TK[rows_T, 1]) and (second.ids_TK[rows_T, 1:] == -1).all()
    assert not second.weights_TK[rows_T, 1:].any()
    valid_T = torch.arange(T) % 4 < 3
    doubled = routed(router, RoutingEdits(weights=Edit(lambda weights, ids: 2 * weights + 1, rows_T)),
                     valid_T=valid_T)
    expected = (2 * plain.weights_TK + 1).where(rows_T[:, None], plain.weights_TK) * valid_T[:, None]
    torch.testing.assert_close(doubled.weights_TK, expected, rtol=0, atol=0)


@chosen_routers(lambda router: type(router) in (TopKRouter, SigmoidRouter) and router.op_rule is not None)
def test_an_edited_decision_is_not_made_by_the_one_op(option, overrides, monkeypatch):
    """Which knows no edits. The other routers of the model still use it."""
    router = router_of(option, overrides)
    monkeypatch.setattr("moetrain.routers.groups.kernel_takes", lambda logits_TE, rule: True)
    monkeypatch.setattr(router, "route_in_one", lambda *arguments: "by the one op")
    assert routed(router) == "by the one op" == routed(router, RoutingEdits())
    assert not (routed(router, RoutingEdits(scores=set_score(2, float("-inf")))).ids_TK == 2).any()


@pytest.mark.parametrize("cls", [TopKRouter, SigmoidRouter])
@pytest.mark.parametrize("step", ["scores", "choose", "weigh", "probabilities"])
def test_a_subclass_that_changes_a_step_is_not_left_to_the_one_op(cls, step, monkeypatch):
    """The op would follow the rule of the class above, without a word."""
    monkeypatch.setattr("moetrain.routers.groups.kernel_takes", lambda logits_TE, rule: True)
    changed = type("Changed", (cls,), {step: getattr(cls, step)})
    of_rule = type("OfItsOwnRule", (changed,), {"op_rule": cls.op_rule})
    for made, whole in ((cls, True), (type("Same", (cls,), {}), True), (changed, False), (of_rule, True)):
        router = made(dim=D, num_experts=8, top_k=2)
        assert router.in_one(context(3)) == whole, made


def test_gradients_pass_through_an_edit_of_weights():
    router = router_of("topk", [])
    ours = routed(router, RoutingEdits(weights=Edit(lambda weights, ids: 2 * weights))).weights_TK
    seed = torch.randn(ours.shape, generator=torch.Generator().manual_seed(0)).double()
    found, plain = (torch.autograd.grad((w * seed).sum(), router.weight)[0]
                    for w in (ours, routed(router).weights_TK))
    torch.testing.assert_close(found, 2 * plain)


@pytest.mark.parametrize("edits, why", [
    (RoutingEdits(scores=Edit(lambda scores: scores.fill_(0))), "wrote into its argument"),
    (RoutingEdits(ids=Edit(lambda ids: ids[:, :1])), r"made torch.int64 \(40, 1\) of torch.int64 \(40, 3\)"),
    (RoutingEdits(weights=Edit(lambda weights, ids: weights.float())), "made torch.float32"),
])
def test_what_is_no_edit_is_refused(edits, why):
    with pytest.raises(ValueError, match=why):
        routed(router_of("topk", []), edits)


class HashRouter(Router):
    """Test-only: expert by token id, without scores, gates and logits."""

    depends_on = frozenset({"token_ids_T"})

    def scores(self, x_TD: Tensor, context: RouterContext) -> Scores:
        return Scores(None)

    def choose(self, order_TC: Tensor | None, context: RouterContext) -> Tensor:
        return (context.token_ids_T[:, None] + torch.arange(self.top_k)) % self.num_experts


def test_a_router_without_scores_and_parameters_has_statistics():
    router, ids_T = HashRouter(num_experts=E, top_k=2), torch.arange(10)
    assert not list(router.parameters()) and router.starts() == {}
    routing = router.route(torch.zeros(10, 4, dtype=torch.bfloat16), RouterContext(
        router=NAME, token_ids_T=ids_T, valid_T=ids_T < 8, seq_offsets=torch.tensor([0, 5, 10])))
    assert routing.weights_TK.dtype == torch.float32 and (routing.weights_TK[:8] == 0.5).all()
    assert not routing.weights_TK[8:].any() and (routing.stats.counts_E == 2).all()
    stats = routing.stats
    assert (stats.prob_sum_E == 1).all() and stats.lse2_sum == 0 and stats.tokens == 8
    torch.testing.assert_close(stats.entropy_sum, 8 * torch.tensor(2.0).log())
    assert stats.counts_SE.sum(0).equal(stats.counts_E) and stats.prob_sum_SE.sum() == 8
    with pytest.raises(ValueError, match="HashRouter has no scores to edit"):
        router.route(torch.zeros(10, 4), RouterContext(router=NAME, token_ids_T=ids_T,
                                                       edits={NAME: RoutingEdits(scores=set_score(0, 1.0))}))


def test_edits_of_a_router_that_defines_route_are_refused():
    class Own(HashRouter):
        def route(self, x_TD: Tensor, context: RouterContext) -> Routing:
            ids_TK = torch.zeros(len(x_TD), 1, dtype=torch.int64)
            return self.routing(ids_TK, torch.ones(len(x_TD), 1), None, None, context)

        def starts(self) -> dict[str, Start]:
            return {}

    router = Own(num_experts=E, top_k=1)
    assert routed(router).stats.counts_E[0] == T
    with pytest.raises(ValueError, match="Own defines route"):
        routed(router, RoutingEdits(ids=Edit(torch.clone)))
