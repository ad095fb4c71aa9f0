"""The schedules, the parameter groups, and AdamW's state before the first step."""

import math
from dataclasses import replace

import pytest
import torch

from moetrain.config.schema import OptimConfig
from moetrain.train.optim.lr_schedule import learning_rate
from moetrain.train.optim.optimizer import allocate_state, build_optimizer, set_learning_rate
from tests.support.training import make_run

OPTIM = OptimConfig(name="adamw", lr=2.0, warmup=4, min_lr_ratio=0.1, schedule="cosine")


def test_the_rate_rises_in_a_line_then_falls_as_a_cosine_to_its_floor():
    assert [learning_rate(step, 24, OPTIM) for step in (1, 2, 3, 4)] == [0.5, 1.0, 1.5, 2.0]
    assert learning_rate(14, 24, OPTIM) == pytest.approx((2 + 0.2) / 2)              # half-way down
    assert learning_rate(9, 24, OPTIM) == pytest.approx(0.2 + 1.8 * (1 + math.sqrt(0.5)) / 2)
    assert learning_rate(24, 24, OPTIM) == pytest.approx(0.2)
    rates = [learning_rate(step, 24, OPTIM) for step in range(4, 25)]
    assert rates == sorted(rates, reverse=True)


def test_the_rate_stays_at_its_floor_after_the_end():
    assert learning_rate(1000, 24, OPTIM) == pytest.approx(0.2)


@pytest.mark.parametrize("warmup, steps", [(0, 1), (0, 10), (10, 10), (20, 10)])
def test_short_runs_and_no_warmup_have_a_rate(warmup, steps):
    optim = OptimConfig(lr=1.0, warmup=warmup, min_lr_ratio=0.0, schedule="cosine")
    assert all(0 <= learning_rate(step, steps, optim) <= 1 for step in range(1, steps + 1))
    assert learning_rate(1, 10, OptimConfig(lr=1.0, warmup=0, min_lr_ratio=0.0, schedule="cosine")) > 0.9


WSD = OptimConfig(lr=2.0, warmup=4, min_lr_ratio=0.1, schedule="wsd", decay=0.25)


def test_wsd_warms_up_stays_and_decays_over_the_last_share_of_the_steps():
    rates = [learning_rate(step, 40, WSD) for step in range(1, 41)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert set(rates[3:30]) == {2.0}                                    # the last of them is step 30
    assert rates[30:] == pytest.approx([2.0 - 1.8 * step / 10 for step in range(1, 11)])


def test_wsd_by_the_root_falls_fast_at_first():
    optim = replace(WSD, decay_shape="sqrt")
    assert [learning_rate(step, 40, optim) for step in range(31, 41)] == pytest.approx(
        [0.2 + 1.8 * (1 - math.sqrt(step / 10)) for step in range(1, 11)])


@pytest.mark.parametrize("shape", ["linear", "sqrt"])
@pytest.mark.parametrize("steps", [1, 3, 10])
@pytest.mark.parametrize("warmup", [0, 3, 20])
def test_wsd_at_its_edges(shape, steps, warmup):
    """No decay: constant to the end. Nothing but decay: it begins with the end of the warm-up."""
    for decay in (0.0, 0.9, 1.0):
        optim = replace(WSD, warmup=warmup, decay=decay, decay_shape=shape, min_lr_ratio=0.0)
        rates = [learning_rate(step, steps, optim) for step in range(1, steps + 1)]
        rising, after = rates[:warmup], rates[warmup:]
        assert rising == [2.0 * step / warmup for step in range(1, len(rising) + 1)]
        if decay == 0:
            assert set(after) <= {2.0}
        elif after:
            assert after == sorted(set(after), reverse=True) and after[-1] == 0.0
            assert decay < 1 or after[0] < 2.0


@pytest.mark.parametrize("decay", [0.8, 1.0])
def test_a_decay_that_would_begin_inside_the_warm_up_begins_at_its_end(decay):
    optim = replace(WSD, warmup=3, decay=decay, min_lr_ratio=0.0)
    assert [learning_rate(step, 10, optim) for step in (3, 4, 10)] == pytest.approx([2.0, 2.0 * 6 / 7, 0.0])


@pytest.mark.parametrize("shape", ["linear", "sqrt"])
def test_a_run_that_stops_before_its_decay_and_goes_on_with_more_steps_is_the_longer_run(shape):
    optim = replace(WSD, decay_shape=shape)
    first, longer = ([learning_rate(step, steps, optim) for step in range(1, 31)] for steps in (40, 400))
    assert first == longer
    assert learning_rate(31, 40, optim) != learning_rate(31, 400, optim)
    assert learning_rate(41, 40, optim) == learning_rate(400, 400, optim) == pytest.approx(0.2)


def test_every_parameter_is_in_one_group_and_only_matrices_decay():
    run = make_run(["model.num_shared_experts=1", "model.qk_norm=head", "optim.weight_decay=0.3",
                    "optim.router_lr_scale=0.5", "optim.expert_lr_scale=2"])
    names = {id(parameter): name for name, parameter in run.state.model.named_parameters()}
    groups = {group["name"]: group for group in run.state.optimizer.param_groups}
    members = {kind: {names[id(p)] for p in group["params"]} for kind, group in groups.items()}
    assert sorted(sum(map(list, members.values()), [])) == sorted(names.values())
    assert {kind: group["weight_decay"] for kind, group in groups.items()} == {
        "dense": 0.3, "expert": 0.3, "undecayed": 0.0, "router": 0.0}
    assert {kind: group["lr_scale"] for kind, group in groups.items()} == {
        "dense": 1.0, "expert": 2.0, "undecayed": 1.0, "router": 0.5}
    assert members["undecayed"] == {"embed", "head", *(name for name in names.values() if "norm" in name)}
    assert members["router"] == {f"layers.{layer}.moe.router.weight" for layer in (0, 1)}
    assert members["expert"] == {f"layers.{layer}.moe.experts.bank.{matrix}" for layer in (0, 1)
                                 for matrix in ("gate_up", "down")}
    assert members["dense"] == {f"layers.{layer}.{name}.weight" for layer in (0, 1) for name in
                                ("attention.qkv", "attention.out", "moe.shared.gate_up", "moe.shared.down")}


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_vectors_of_experts_do_not_decay_and_are_not_muons(optim):
    run = make_run(["run.packages=[tests]", "expert._target_=tests.support.expert_forms.BiasedExpert",
                    f"optim={optim}", "optim.weight_decay=0.3", "optim.expert_lr_scale=2"])
    (group,) = (group for group in run.state.optimizer.param_groups if group["name"] == "expert_vectors")
    banks = [routed.bank for routed in run.state.model.banks.values()]
    biases = [bias for bank in banks for bias in (bank.up_bias, bank.down_bias)]
    assert set(map(id, group["params"])) == set(map(id, biases))
    assert group["weight_decay"] == 0.0 and group["lr_scale"] == 2.0
    assert all("momentum_buffer" not in run.state.optimizer.state[p] for p in group["params"])


def test_a_groups_rate_is_the_schedules_times_its_scale():
    run = make_run(["optim.router_lr_scale=0.5", "optim.expert_lr_scale=2"])
    set_learning_rate(run.state.optimizer, 0.1)
    assert {group["name"]: group["lr"] for group in run.state.optimizer.param_groups} == pytest.approx(
        {"dense": 0.1, "undecayed": 0.1, "router": 0.05, "expert": 0.2})


def test_a_step_follows_adamw_by_hand():
    """Decoupled decay, bias correction: two steps of a matrix and of a vector."""
    optim = OptimConfig(name="adamw", lr=0.1, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.5)
    model = torch.nn.Linear(2, 3).double()
    optimizer = build_optimizer(model, optim)
    allocate_state(optimizer)
    expected = [p.detach().clone() for p in (model.weight, model.bias)]
    m, v = [0.0, 0.0], [0.0, 0.0]
    for step in (1, 2):
        for index, (parameter, decay) in enumerate(((model.weight, 0.5), (model.bias, 0.0))):
            grad = torch.randn_like(parameter)
            parameter.grad = grad
            m[index] = 0.9 * m[index] + 0.1 * grad
            v[index] = 0.95 * v[index] + 0.05 * grad**2
            update = m[index] / (1 - 0.9**step) / ((v[index] / (1 - 0.95**step)).sqrt() + 1e-8)
            expected[index] = expected[index] * (1 - 0.1 * decay) - 0.1 * update
        optimizer.step()
    for parameter, truth in zip((model.weight, model.bias), expected):
        torch.testing.assert_close(parameter.detach(), truth)


def test_allocated_state_is_what_a_first_step_would_start_from():
    models = [torch.nn.Linear(2, 3) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [build_optimizer(model, OPTIM) for model in models]
    allocate_state(optimizers[0])
    assert all(not value.any() for state in optimizers[0].state.values() for value in state.values())
    for model, optimizer in zip(models, optimizers):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.3)
        optimizer.step()
    for ours, its in zip(*(model.parameters() for model in models)):
        assert torch.equal(ours, its)
    ours, its = (optimizer.state_dict()["state"] for optimizer in optimizers)
    assert {key: {name: value.dtype for name, value in state.items()} for key, state in ours.items()} == \
           {key: {name: value.dtype for name, value in state.items()} for key, state in its.items()}
