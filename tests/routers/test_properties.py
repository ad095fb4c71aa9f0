"""What every router of conf/router/ promises, whatever it routes by (moetrain/check/router.py)."""

import torch
from torch.nn.functional import silu

from moetrain.check.findings import findings
from moetrain.check.router import router_checks
from moetrain.model.initialization import declared_starts, initialize
from tests.support.any_router import (
    D,
    E,
    chosen,
    chosen_routers,
    context,
    every_router,
    router_of,
    tokens,
)
from tests.support.training import make_run


@every_router
def test_it_keeps_all_promises(option, overrides):
    router = router_of(option, overrides)
    found = list(findings(router_checks(lambda: router_of(option, overrides), D)))
    assert len(found) == 8 and [finding for finding in found if finding.problem] == []
    untried = [finding.not_tried for finding in found if finding.not_tried]
    assert untried.count("the router says causal = False") == 2 * (not router.causal)
    assert not list(router.parameters()) or len(untried) == 2 * (not router.causal)


@chosen_routers(lambda router: not router.causal)
def test_a_router_that_says_so_looks_ahead(option, overrides):
    router, x_TD = router_of(option, overrides), tokens(12)
    told = context(12, positions_T=torch.arange(12))
    before = router.route(x_TD, told)
    x_TD[6:] = 3 * tokens(12, seed=2)[6:]
    assert not router.route(x_TD, told).ids_TK[:6].equal(before.ids_TK[:6])


@every_router
def test_no_token_at_all_is_valid(option, overrides):
    """Padding alone: no used slot, no statistics, finite gradients."""
    router = router_of(option, overrides)
    routing = router.route(tokens(6), context(6, valid_T=torch.zeros(6, dtype=torch.bool)))
    assert (routing.ids_TK == -1).all() and not routing.weights_TK.any()
    assert not any(total.any() for total in routing.stats.named().values())
    total = routing.weights_TK.sum() + routing.stats.prob_sum_E.sum()
    trained = [parameter for parameter in router.parameters() if parameter.requires_grad]
    if trained:
        grads = torch.autograd.grad(total, trained, allow_unused=True)
        assert not any(grad.any() for grad in grads if grad is not None)


@chosen_routers(lambda router: router.causal and list(dict(router.named_parameters())) == ["weight"])
def test_all_tokens_may_choose_one_expert_and_leave_others_out(option, overrides):
    router = router_of(option, overrides)
    with torch.no_grad():
        router.weight[:2] = torch.tensor([[1.0], [50.0]])    # two of a group, where there are groups
        router.weight[E - 1] = -50
        for buffer in router.buffers():
            if buffer.is_floating_point():
                buffer.zero_()
    routing = router.route(tokens(4).abs() + 0.1, context(4, training=False))
    counts_E = routing.stats.counts_E
    assert counts_E[1] == 4 and (counts_E == 0).any()
    assert counts_E[:E].sum() == (routing.ids_TK >= 0).sum()
    assert routing.weights_TK.isfinite().all()


@every_router
def test_the_task_trains_every_parameter_that_is_not_frozen(option, overrides):
    router = router_of(option, overrides)
    carry = router.route(tokens(200, seed=2), context(200)).carry        # as a layer before it hands on
    routing = router.route(tokens(200), context(200, carry=None if carry is None else carry.detach()))
    factors_TK = torch.rand(routing.weights_TK.shape, generator=torch.Generator().manual_seed(0))
    lone = (part for part in (routing.residual_T, routing.residual_TD) if part is not None)
    if any(parameter.requires_grad for parameter in router.parameters()):
        ((routing.weights_TK * factors_TK).sum() + sum(part.sum() for part in lone)).backward()
    for name, parameter in router.named_parameters():
        moved = parameter.grad is not None and bool(parameter.grad.any())
        assert moved == parameter.requires_grad, name


@every_router
def test_every_tensor_starts_and_a_state_dict_brings_all_of_it_back(option, overrides):
    router, other = router_of(option, overrides), router_of(option, overrides)
    initialize(other, declared_starts(other), seed=4, std=0.5, num_layers=2)
    ours, its = router.route(tokens(20), context(20)), other.route(tokens(20), context(20))
    if list(router.parameters()):
        assert not (ours.ids_TK.equal(its.ids_TK) and ours.weights_TK.equal(its.weights_TK))
    other.load_state_dict(router.state_dict())
    again = other.route(tokens(20), context(20))
    assert again.ids_TK.equal(ours.ids_TK) and again.weights_TK.equal(ours.weights_TK)


@every_router
def test_a_layer_is_the_sum_of_its_experts_by_a_loop_over_tokens(option, overrides):
    model = make_run(["run.dtype=float64", *chosen(option, overrides)]).state.model
    layer = model.layers[0].moe
    x_TD = torch.randn(20, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    told, bank = context(20, tied=model.tied)._replace(router=layer.name), layer.experts.bank
    routing = layer.router.route(x_TD, told)
    expected_TD, input_TD = torch.zeros_like(x_TD), x_TD if routing.input_TD is None else routing.input_TD
    for token, (ids_K, weights_K) in enumerate(zip(routing.ids_TK.tolist(), routing.weights_TK)):
        for expert, weight in zip(ids_K, weights_K):
            gate_F, up_F = (bank.gate_up[expert] @ input_TD[token]).chunk(2)
            expected_TD[token] += weight * (bank.down[expert] @ (silu(gate_F) * up_F))
    if routing.residual_T is not None:                       # choices that are no experts
        expected_TD += routing.residual_T[:, None] * x_TD
    if routing.residual_TD is not None:
        expected_TD += routing.residual_TD
    torch.testing.assert_close(layer(x_TD, told).out_TD, expected_TD)


@chosen_routers(lambda router: bool(router.choice_tensors) and not router.holds_ids)
def test_experts_may_be_named_in_any_order(option, overrides):
    """Inside groups, which are sets of consecutive ids."""
    router, renamed = router_of(option, overrides), router_of(option, overrides)
    generator, groups = torch.Generator().manual_seed(0), getattr(router, "num_groups", 1)
    order = torch.cat([first + torch.randperm(E // groups, generator=generator)
                       for first in range(0, E, E // groups)])
    state = router.state_dict()
    for name in router.choice_tensors:                       # choices that are no experts keep their places
        state[name] = torch.cat([state[name][:E][order], state[name][E:]])
    renamed.load_state_dict(state)
    told = context(20, training=False)                       # what is drawn belongs to an id
    ours, its = renamed.route(tokens(20), told), router.route(tokens(20), told)
    assert order[ours.ids_TK].where(ours.ids_TK >= 0, -1).equal(its.ids_TK)
    torch.testing.assert_close(ours.weights_TK, its.weights_TK)
