"""A frozen random router: its schedule of k, its softmax, and that nothing ever trains it."""

import numpy as np
import pytest
import torch

from moetrain.model.initialization import materialize
from moetrain.routers.base import RouterContext
from moetrain.routers.fixed_random import FixedRandomRouter
from moetrain.train.step import train_step
from tests.support.training import make_run

E, D = 16, 5


def router_of(k: int = 4, **given) -> FixedRandomRouter:
    router = FixedRandomRouter(dim=D, num_experts=E, top_k=k, total_steps=600, **given)
    materialize(router, seed=3, std=1.0, num_layers=1)
    return router


def tokens(count: int = 7) -> torch.Tensor:
    return torch.randn(count, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def released(mode: str, step: int, total: int, low: int, high: int) -> int:
    """The schedules of the released code."""
    if mode == "linear":
        k = np.round((high - low) * step / total) + low
    elif mode == "cosine":
        k = np.round((low - high) * np.cos(np.pi * step / (2 * total))) + high
    elif mode == "exp":
        k = np.round((low - high) * 0.99 ** (step // (total // 300))) + high
    else:
        k = [1, 2, 4, 8, 16][min(4, int(5 * step / total))]              # at the end it reads beyond the list
    return int(np.clip(k, low, high))


@pytest.mark.parametrize("schedule", ["linear", "cosine", "exp", "step"])
@pytest.mark.parametrize("low", [1, 8])
def test_k_grows_as_in_the_released_code(schedule, low):
    router = router_of(16, k_min=low, schedule=schedule)
    ks = [router.experts_at(step) for step in range(601)]
    if schedule != "step" or low == 1:
        theirs = [released(schedule, step, 600, low, 16) for step in range(601)]
        assert sum(a != b for a, b in zip(ks, theirs)) <= 1      # cos(pi / 3) is a half but for rounding
    last = 15 if (schedule, low) == ("exp", 1) else 16                   # 0.99^300 is 0.05
    assert ks[0] == low and ks[-1] == last and ks == sorted(ks) and router.experts_at(10**6) == last


def test_without_a_schedule_k_is_the_last_one():
    assert {router_of(schedule="none").experts_at(step) for step in (0, 1, 600)} == {4}
    assert router_of(2, k_min=8).experts_at(1) == 2                          # as evaluation may ask for


def test_the_growth_has_a_length_of_its_own_or_that_of_the_run():
    ours, own, constant = router_of(16), router_of(16, growth_steps=300), router_of(16, schedule="none")
    assert all(own.experts_at(step) == ours.experts_at(2 * step) for step in (0, 1, 150, 300, 900))
    assert "of step 301 has 9 experts, where it had 16; router.growth_steps=300" in ours.resumed(301, 300)
    assert "was 599 and is 600" in ours.resumed(1, 599)                      # in the middle, by one expert
    assert ours.resumed(301, 600) is own.resumed(301, 300) is constant.resumed(1, 9) is None


@pytest.mark.parametrize("step", [1, 300, 600])
def test_a_token_takes_the_largest_k_by_their_softmax(step):
    router, x_TD = router_of(k_min=1, scale=3.0), tokens()
    found = router.route(x_TD, RouterContext(step=step))
    logits_TE = x_TD.numpy() @ router.weight.detach().numpy().T + router.bias.detach().numpy()
    k = released("linear", step, 600, 1, 4)
    for token, logits_E in enumerate(logits_TE):
        best = np.argsort(-logits_E)[:k]
        shares = np.exp(logits_E[best]) / np.exp(logits_E[best]).sum()
        assert found.ids_TK[token].tolist() == [*best, *[-1] * (4 - k)]
        np.testing.assert_allclose(found.weights_TK[token, :k], 3 * shares, rtol=1e-12)
    assert found.max_rows == 7 * k == found.stats.active_sum


def test_numbers_are_uniform_as_those_of_a_linear_layer():
    router = FixedRandomRouter(dim=64, num_experts=E, top_k=1, total_steps=1)
    materialize(router, seed=0, std=9.0, num_layers=1)
    bound = 64 ** -0.5
    assert 0.98 * bound < router.weight.abs().max() < bound > router.bias.abs().max()
    assert router.weight.var().sqrt() == pytest.approx(bound / 3 ** 0.5, rel=0.05)


def test_training_changes_no_bit_of_it_and_keeps_no_moments():
    run = make_run(["router=fixed_random", "router.schedule=none"])
    router = run.state.model.layers[0].moe.router
    before = {name: tensor.clone() for name, tensor in router.state_dict().items()}
    for step in (1, 2):
        train_step(run, step)
    assert all(tensor.equal(before[name]) for name, tensor in router.state_dict().items())
    stepped = {id(parameter) for group in run.state.optimizer.param_groups for parameter in group["params"]}
    assert not stepped & {id(parameter) for parameter in router.parameters()}
    assert not run.state.optimizer.state.keys() & set(router.parameters())


def test_equal_weights_of_all_slices_are_the_dense_network():
    """Experts are slices of one wide network; at k = E each weighs scale / E = 1."""
    run = make_run(["run.dtype=float64", "router=fixed_random", "router.schedule=none", "router.scale=8",
                    "model.top_k=8"])
    layer = run.state.model.layers[0].moe
    torch.nn.init.zeros_(layer.router.weight), torch.nn.init.zeros_(layer.router.bias)
    x_TD = torch.randn(9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gate, up = (part.flatten(0, 1) for part in layer.experts.bank.gate_up.chunk(2, dim=1))   # [8 F, D]
    down = layer.experts.bank.down.transpose(0, 1).flatten(1)                                # [D, 8 F]
    wide_TD = (torch.nn.functional.silu(x_TD @ gate.T) * (x_TD @ up.T)) @ down.T
    torch.testing.assert_close(layer(x_TD, RouterContext(step=1)).out_TD, wide_TD)
