"""Sigmoid routing: the bias only chooses, follows the load of whole steps, and is the same everywhere."""

import pytest
import torch
from torch import Tensor

from moetrain.ops.counts import count_ids, load_error_sign
from moetrain.ops.gating import gather_weights
from moetrain.routers.base import RouterContext
from moetrain.routers.sigmoid import SigmoidRouter
from moetrain.train.evaluation.evaluate import evaluate
from moetrain.train.step import train_step
from tests.support.oracle import oracle_loss
from tests.support.training import Trained, difference, make_run, snapshot, union, whole

CONTEXT = RouterContext()
OVERRIDES = ["router=sigmoid", "router.scale=2.5", "router.update_rate=0.05", "balance.weight=0.01",
             "run.dtype=float64",
             "data.min_length=0.2"]
GROUPED = ["router.num_groups=4", "router.topk_groups=2"]


def router_of(*, experts: int = 6, k: int = 2, dtype: torch.dtype = torch.float64,
              **arguments) -> SigmoidRouter:
    router = SigmoidRouter(dim=3, num_experts=experts, top_k=k, **arguments).to(dtype)
    with torch.no_grad():
        router.weight.copy_(torch.randn(experts, 3, generator=torch.Generator().manual_seed(0)))
    return router


def tokens(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, 3, dtype=dtype, generator=torch.Generator().manual_seed(1))


def biases(experts: int, std: float = 0.6) -> Tensor:
    return std * torch.randn(experts, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


# --- choice and weights


@pytest.mark.parametrize("weights", ["renorm", "raw"])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_weights_and_their_gradients_follow_the_convention(weights, count):
    router, x_TD = router_of(weights=weights, scale=2.5), tokens(count).requires_grad_()
    router.bias.copy_(biases(6))
    routing = router.route(x_TD, CONTEXT)
    scores_TE = 1 / (1 + (-x_TD @ router.weight.T).exp())
    ids_TK = (scores_TE + router.bias).topk(2).indices
    weights_TK = scores_TE.gather(1, ids_TK)
    weights_TK = 2.5 * (weights_TK if weights == "raw" else weights_TK / weights_TK.sum(1, keepdim=True))
    assert routing.ids_TK.equal(ids_TK)
    torch.testing.assert_close(routing.weights_TK, weights_TK)
    torch.testing.assert_close(routing.stats.prob_sum_E, (scores_TE / scores_TE.sum(1, keepdim=True)).sum(0))
    scale_TK = torch.randn(count, 2, dtype=torch.float64)
    ours, truth = (torch.autograd.grad(w, (x_TD, router.weight), scale_TK)
                   for w in (routing.weights_TK, weights_TK))
    torch.testing.assert_close(ours, truth)


def test_a_bias_changes_who_is_chosen_and_not_the_weights_of_a_choice():
    plain, biased = router_of(scale=2.5), router_of(scale=2.5)
    biased.bias.copy_(biases(6))
    x_TD = tokens(40)
    before, after = plain.route(x_TD, CONTEXT), biased.route(x_TD, CONTEXT)
    scores_TE = plain.logits(x_TD).sigmoid()
    same_T = (before.ids_TK.sort(1).values == after.ids_TK.sort(1).values).all(1)
    assert 0 < same_T.sum() < 40
    gates = [torch.zeros(40, 6, dtype=torch.float64).scatter(1, r.ids_TK, r.weights_TK)
             for r in (before, after)]
    torch.testing.assert_close(gates[1][same_T], gates[0][same_T])
    # Where the choice differs, the scores weigh it.
    raw_TK = gather_weights(scores_TE, after.ids_TK)
    torch.testing.assert_close(after.weights_TK, 2.5 * raw_TK / raw_TK.sum(1, keepdim=True))


@pytest.mark.parametrize("groups", [
    {}, {"num_groups": 4, "topk_groups": 2}, {"num_groups": 4, "topk_groups": 2, "group_score": "max"}])
def test_a_constant_in_all_biases_changes_nothing(groups):
    router, shifted = (router_of(experts=16, k=3, **groups) for _ in range(2))
    router.bias.copy_(biases(16))
    shifted.bias.copy_(biases(16) - 3)                               # every biased score is negative
    ours, its = router.route(tokens(60), CONTEXT), shifted.route(tokens(60), CONTEXT)
    assert ours.ids_TK.equal(its.ids_TK) and ours.weights_TK.equal(its.weights_TK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_padding_chooses_nothing_and_leaves_no_trace(dtype):
    router, x_TD = router_of(dtype=dtype), tokens(5, dtype).requires_grad_()
    valid_T = torch.tensor([True, False, True, False, False])
    routing, alone_ = router.route(x_TD, RouterContext(valid_T=valid_T)), router.route(x_TD[valid_T], CONTEXT)
    assert (routing.ids_TK[~valid_T] == -1).all() and not routing.weights_TK[~valid_T].any()
    for ours, its in zip(routing.stats, alone_.stats):
        torch.testing.assert_close(ours, its)
    value = (routing.weights_TK * 1e6).square().sum() + routing.stats.prob_sum_E[0]
    (gradient_TD,) = torch.autograd.grad(value, x_TD)
    assert gradient_TD.isfinite().all() and not gradient_TD[~valid_T].any()


def test_scores_that_vanish_give_finite_weights_and_gradients():
    router, x_TD = router_of(dtype=torch.float32), tokens(3, torch.float32)
    with torch.no_grad():
        router.weight.fill_(-1e3)
    routing = router.route(x_TD.abs().requires_grad_(), CONTEXT)
    (routing.weights_TK.sum() + routing.stats.prob_sum_E.sum()).backward()
    assert routing.weights_TK.isfinite().all() and router.weight.grad.isfinite().all()
    assert routing.ids_TK.tolist() == [[0, 1]] * 3                   # all equal: the lower ids


# --- the bias follows the load


def test_an_update_moves_every_bias_by_the_rate_against_its_load():
    router = router_of(experts=4, update_rate=0.25, center=False)
    router.end_of_step(torch.tensor([3, 1, 2, 2]), tokens=4)                   # the mean is 2
    assert router.bias.tolist() == [-0.25, 0.25, 0.0, 0.0]
    router.end_of_step(torch.tensor([0, 0, 0, 0]), tokens=4)
    assert router.bias.tolist() == [-0.25, 0.25, 0.0, 0.0]
    router.end_of_step(torch.tensor([0, 0, 0, 3]), tokens=4)                   # the mean is 0.75
    assert router.bias.tolist() == [0.0, 0.5, 0.25, -0.25]


def test_a_bias_of_micro_batches_moves_by_the_mean_of_their_leans():
    router = router_of(experts=4, update_rate=0.25, counts="micro", center=False)
    assert router.needs_load_error and not router_of(experts=4).needs_load_error
    signs_E = torch.stack([load_error_sign(torch.tensor(counts))
                           for counts in ([3, 1, 2, 2], [0, 0, 0, 8])]).double().mean(0)
    assert signs_E.tolist() == [0.0, 1.0, 0.5, -0.5]
    router.end_of_step(torch.tensor([3, 1, 2, 10]), 8, signs_E)
    assert router.bias.tolist() == [0.0, 0.25, 0.125, -0.125]


def test_a_centred_bias_has_mean_zero_and_makes_the_same_choices():
    plain = router_of(experts=4, update_rate=0.25, center=False)
    centred = router_of(experts=4, update_rate=0.25)
    for counts in ([9, 1, 1, 1], [1, 9, 1, 1], [9, 1, 1, 1]):
        for router in (plain, centred):
            router.end_of_step(torch.tensor(counts), tokens=4)
    assert plain.bias.tolist() == [-0.25, 0.25, 0.75, 0.75]
    assert centred.bias.tolist() == [-0.625, -0.125, 0.375, 0.375]
    assert plain.route(tokens(50), CONTEXT).ids_TK.equal(centred.route(tokens(50), CONTEXT).ids_TK)


def test_biases_that_drift_together_cost_no_choice_in_float32():
    """Each update overloads another expert: all biases move beyond 140, where float32 has steps of 1.5e-5."""
    exact = router_of(experts=16, update_rate=0.25, center=False)
    drifting, ours = (router_of(experts=16, update_rate=0.25, dtype=torch.float32, **given)
                      for given in ({"center": False}, {}))
    for update in range(645):
        counts_E = torch.ones(16, dtype=torch.int64)
        counts_E[update % 16] = 100
        for router in (exact, drifting, ours):
            router.end_of_step(counts_E, tokens=4)
    assert exact.bias.mean() > 140 and drifting.bias.double().equal(exact.bias)
    assert ours.bias.mean().abs() < 1e-6
    scores_TE = torch.rand(100_000, 16, generator=torch.Generator().manual_seed(3))
    truth_TK, of_drifting_TK, of_ours_TK = (router.choose(scores_TE + router.bias, CONTEXT)
                                            for router in (exact, drifting, ours))
    assert (of_drifting_TK != truth_TK).any() and of_ours_TK.equal(truth_TK)


def test_a_rate_of_zero_and_a_loss_leave_the_bias_alone():
    router = router_of(update_rate=0.0)
    router.end_of_step(torch.tensor([9, 0, 0, 0, 0, 0]), tokens=4)
    assert not router.bias.any() and not router.bias.requires_grad
    assert "bias" in router.state_dict() and [name for name, _ in router.named_parameters()] == ["weight"]


@pytest.mark.parametrize("groups", [{}, {"num_groups": 4, "topk_groups": 2}])
def test_skewed_scores_are_evened_out_over_updates(groups):
    router = router_of(experts=16, k=2, update_rate=0.002, **groups)
    generator = torch.Generator().manual_seed(5)
    logits_TE = torch.randn(512, 16, dtype=torch.float64, generator=generator) + torch.linspace(-2, 2, 16)
    scores_TE = logits_TE.sigmoid()
    ratios = []
    for _ in range(200):
        counts_E = count_ids(router.choose(scores_TE + router.bias, CONTEXT), 16)
        ratios.append((counts_E.max() / counts_E.double().mean()).item())
        router.end_of_step(counts_E, tokens=4)
    means = torch.tensor(ratios).view(5, 40).mean(1)
    assert (means.diff() < 0).all(), means                           # monotone on average
    assert ratios[0] > 3 and means[-1] < 1.25


def test_the_bias_is_as_wide_as_the_router():
    for dtype, stored in (("float32", torch.float32), ("bfloat16", torch.float32),
                          ("float64", torch.float64)):
        run = make_run(["router=sigmoid", f"run.dtype={dtype}"])
        found = biases_of(run)
        assert set(found) == {"layers.0.moe", "layers.1.moe"}
        # Memory is allocated after construction, and zeroed then.
        assert all(bias.dtype == stored and not bias.any() for bias in found.values())


# --- training


def biases_of(run) -> dict[str, Tensor]:
    return {block.moe.name: block.moe.router.bias.clone() for block in run.state.model.layers
            if block.moe is not None}


def train(overrides: list[str], steps: int) -> tuple[Trained, list[dict[str, Tensor]]]:
    """What `train_steps` gives, and the biases after each step."""
    run = make_run(overrides)
    metrics, counts, found = [], [], []
    for step in range(1, steps + 1):
        result = train_step(run, step)
        metrics.append(result.metrics)
        counts.append({name: count.clone() for name, count in result.counts.items()})
        found.append(biases_of(run))
    return Trained(snapshot(run, lambda parameter: parameter.data), {}, metrics, counts), found


@pytest.mark.parametrize("groups, oracle", [
    ([], (1, 1, 2)), (GROUPED, (4, 2, 2)), ([*GROUPED, "router.group_score=max"], (4, 2, 1))])
@pytest.mark.parametrize("gate", ["renorm", "raw"])
def test_a_step_gives_what_the_oracle_gives(groups, oracle, gate):
    run = make_run([*OVERRIDES, *groups, f"router.weights={gate}", "train.clip=0", "router.update_rate=0"])
    for layer, block in enumerate(run.state.model.layers):
        block.moe.router.bias.copy_(biases(8, 0.1 + layer))
    start = whole([snapshot(run, lambda p: p.data)])
    params = {name.removesuffix(".weight"): tensor.requires_grad_() for name, tensor in start.items()}
    batches = [(b.tokens_BS, b.targets_BS, b.valid_BS) for b in run.loader.step(1)]
    total, ce, balance, counts = oracle_loss(
        params, batches, balance_weight=0.01, z_weight=0.01, num_layers=2, num_heads=4, num_kv_heads=2,
        head_dim=4, top_k=2, num_experts=8, sigmoid=True, scale=2.5, gate=gate, groups=oracle,
        bias={0: biases(8, 0.1), 1: biases(8, 1.1)})
    total.backward()
    result = train_step(run, 1)
    ours = {name.removesuffix(".weight"): gradient
            for name, gradient in whole([snapshot(run, lambda p: p.grad)]).items()}
    theirs = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in params.items()}
    error, name = difference(ours, theirs)
    assert error < 1e-10, (name, error)
    for key, value in (("loss/total", total), ("loss/ce", ce), ("loss/balance", balance)):
        assert abs(result.metrics[key] - value.item()) < 1e-10, key
    for layer, count in enumerate(counts):
        assert result.counts[f"layers.{layer}.moe"].equal(count)


@pytest.mark.ranks
@pytest.mark.parametrize("mesh, accumulation", [("ddp", 1), ("ep", 2)])
def test_two_ranks_train_as_one_and_hold_the_same_biases(ranks, mesh, accumulation):
    steps, overrides = 5, [*OVERRIDES, *GROUPED]
    single, expected = train([*overrides, "train.micro_batch=16"], steps)
    overrides += [f"parallel={mesh}", "run.nproc=2", f"train.micro_batch={8 // accumulation}"]
    split = ranks(2).run(train, overrides, steps)
    ours = union([trained for trained, _ in split])
    error, name = difference(ours.parameters, whole([single.parameters]))
    assert error < 1e-10, (name, error)
    by_hand = {name: torch.zeros(8, dtype=torch.float64) for name in expected[0]}
    for step in range(steps):
        for name, bias in expected[step].items():
            counts_E = single.counts[step][name]
            by_hand[name] += 0.05 * (counts_E.double().mean() - counts_E).sign()
            by_hand[name] -= by_hand[name].mean()
            assert bias.any() and bias.equal(by_hand[name]), (step, name)
            assert all(found[step][name].equal(bias) for _, found in split), (step, name)


def test_evaluation_leaves_the_bias_alone():
    run = make_run([*OVERRIDES, "eval.windows=4"])
    train_step(run, 1)
    before = biases_of(run)
    evaluate(run.state.model, run.dataset, run.mesh, run.config, step=run.state.step)
    after = biases_of(run)
    assert all(before[name].any() and before[name].equal(bias) for name, bias in after.items())


def test_accumulation_changes_neither_loss_nor_bias():
    whole_batch, split = (train([*OVERRIDES, f"train.micro_batch={size}"], 3) for size in (16, 4))
    for ours, its in zip(whole_batch[0].metrics, split[0].metrics):
        assert abs(ours["loss/total"] - its["loss/total"]) < 1e-10
    for ours, its in zip(whole_batch[1], split[1]):
        assert all(bias.equal(its[name]) for name, bias in ours.items())
