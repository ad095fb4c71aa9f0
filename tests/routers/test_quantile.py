"""Quantile balancing: every step's bias is the exact order statistic of the margins of its global batch.

The oracle below is the definition of Megatron-LM's `qb_dual_update` over the whole batch, in numpy. It reads
the logits that routers saw and nothing of what they told.
"""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from moetrain.routers.base import RouterContext
from moetrain.routers.quantile import BiasedRouter
from moetrain.routers.sigmoid import SigmoidRouter
from moetrain.routers.topk import TopKRouter
from moetrain.train import micro_batches
from moetrain.train.checkpoint.load import resume
from moetrain.train.checkpoint.save import save
from moetrain.train.evaluation.evaluate import evaluate
from moetrain.train.margin_quantiles import MarginQuantiles
from moetrain.train.step import train_step
from tests.support.training import in_float64, make_run

OVERRIDES = ["router=sigmoid", "router.balance=quantile", "balance.weight=0.01", "model.num_experts=6",
             "model.init_std=0.4"]
Biases = dict[str, Tensor]


def exact_change(scores_TE: np.ndarray, bias_E: np.ndarray, k: int) -> np.ndarray:
    """The change of bias [E] with which exactly floor(T k / E) tokens would exceed their thresholds."""
    biased_TE = scores_TE + bias_E
    tokens, experts = biased_TE.shape
    threshold_T = np.sort(biased_TE, axis=1)[:, experts - k - 1]             # the (k+1)-th largest
    margins_TE = (threshold_T[:, None] - biased_TE).astype(np.float32)
    return np.sort(margins_TE, axis=0)[tokens * k // experts]


def violation(scores_TE: np.ndarray, bias_E: np.ndarray, k: int) -> float:
    """Max load over mean load, less 1, of these tokens with this bias."""
    chosen_TK = np.argsort(-(scores_TE + bias_E), axis=1, kind="stable")[:, :k]
    counts_E = np.bincount(chosen_TK.ravel(), minlength=len(bias_E))
    return counts_E.max() / counts_E.mean() - 1


def planned_violation(scores_TE: np.ndarray, bias_E: np.ndarray, change_E: np.ndarray, k: int) -> float:
    """The same of the tokens that exceed the thresholds of the old bias: what the new one is planned by."""
    biased_TE = scores_TE + bias_E
    threshold_T1 = np.sort(biased_TE, axis=1)[:, [len(bias_E) - k - 1]]
    counts_E = ((threshold_T1 - biased_TE).astype(np.float32) < change_E.astype(np.float32)).sum(0)
    return counts_E.max() / (len(scores_TE) * k / len(bias_E)) - 1


def biases_of(run) -> Biases:
    return {name: router.bias.clone() for name, router in run.state.model.routers.items()}


def train(overrides: list[str], steps: int) -> list[Biases]:
    """Biases after each step."""
    run = make_run([*in_float64(), *overrides])
    return [train_step(run, step) and biases_of(run) for step in range(1, steps + 1)]


# --- the definition


@pytest.mark.parametrize("router", ["sigmoid", "topk"])
def test_every_step_moves_the_bias_to_the_exact_order_statistic(router, monkeypatch):
    """13 experts of which 3 are chosen, and padding: nothing divides anything."""
    run = make_run([*in_float64(accumulation=2), *OVERRIDES, f"router={router}", "model.num_experts=13",
                    "model.top_k=3", "balance.weight=0"])
    seen: dict[str, list[Tensor]] = {}

    forward_pass = micro_batches.forward_pass

    def watched(run, step, batch, pooled, on_counts, on_margins):
        decisions = []
        monkeypatch.setattr(run, "dump", type("Dump", (), {
            "wanted": True, "add": lambda self, batch, found: decisions.extend(found)})())
        passed = forward_pass(run, step, batch, pooled, on_counts, on_margins)
        valid_T = batch.valid_BS.flatten()
        for decision in decisions:
            logits_TE = decision.logits_TE[valid_T]
            scores_TE = logits_TE.sigmoid() if router == "sigmoid" else logits_TE.softmax(-1)
            seen.setdefault(decision.router, []).append(scores_TE)
        return passed

    def take(router, margins_C):
        taken[router] = margins_C
        take_quantiles(router, margins_C)

    taken, take_quantiles = {}, BiasedRouter.take_quantiles
    monkeypatch.setattr(BiasedRouter, "take_quantiles", take)
    monkeypatch.setattr(micro_batches, "forward_pass", watched)
    for step in range(1, 6):
        seen.clear()
        before = biases_of(run)
        train_step(run, step)
        for name, bias_E in biases_of(run).items():
            scores_TE, old_E = torch.cat(seen[name]).numpy(), before[name].numpy()
            assert 0 < len(scores_TE) < 12 * 12                  # without padding
            change_E = exact_change(scores_TE, old_E, 3)
            expected_E = torch.from_numpy(old_E + change_E)
            assert bias_E.equal(expected_E - expected_E.mean())
            planned, optimum = (planned_violation(scores_TE, old_E, each_E, 3) for each_E in (
                taken[run.state.model.routers[name]].numpy(), change_E))
            print(f"step {step} {name}: violation {violation(scores_TE, old_E, 3):.3f} before, "
                  f"{violation(scores_TE, bias_E.numpy(), 3):.3f} with the new bias; "
                  f"planned {planned:.4f}, the oracle {optimum:.4f}")
            assert planned == optimum <= 0


def test_it_balances_a_fixed_batch_and_a_part_of_the_way_takes_longer():
    rng = np.random.default_rng(0)
    scores_TE = 1 / (1 + np.exp(-rng.normal(size=(997, 16)) - np.linspace(-2, 2, 16)))
    reached = {}
    for rate in (1.0, 0.2):
        bias_E, found = np.zeros(16), []
        for _ in range(20):
            found.append(violation(scores_TE, bias_E, 3))
            bias_E = bias_E + rate * exact_change(scores_TE, bias_E, 3)
        reached[rate] = found
    assert reached[1.0][0] > 1 and reached[1.0][-1] < 0.02 and reached[0.2][3] > reached[1.0][3]


@pytest.mark.parametrize("kind", [SigmoidRouter, TopKRouter])
def test_the_bias_chooses_and_does_not_weigh(kind):
    plain = kind(dim=3, num_experts=6, top_k=2, weights="raw").double()
    biased = kind(dim=3, num_experts=6, top_k=2, weights="raw", balance="quantile").double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        plain.weight.copy_(torch.randn(6, 3, generator=generator))
        biased.weight.copy_(plain.weight)
    biased.take_quantiles(torch.tensor([0.9, 0.0, 0.0, -0.9, float("inf"), 0.0]))
    torch.testing.assert_close(biased.bias, torch.tensor([0.9, 0, 0, -0.9, 0, 0]).double())
    x_TD = torch.randn(50, 3, dtype=torch.float64, generator=generator)
    ours, its = biased.route(x_TD, RouterContext()), plain.route(x_TD, RouterContext())
    assert (ours.ids_TK == 0).any(1).all() and not (ours.ids_TK == 3).any() and (its.ids_TK == 3).any()
    scores_TE = plain.scores(x_TD, RouterContext()).gates_TC
    torch.testing.assert_close(ours.weights_TK, scores_TE.gather(1, ours.ids_TK))
    assert ours.ids_TK.equal(biased.route(x_TD, RouterContext(training=False)).ids_TK)


def test_without_choice_there_is_nothing_to_balance():
    router = TopKRouter(dim=3, num_experts=2, top_k=2, balance="quantile")
    assert router.margin_quantile is None
    assert TopKRouter(dim=3, num_experts=2, top_k=1, weights="raw").margin_quantile is None
    assert "bias" not in TopKRouter(dim=3, num_experts=2, top_k=1, weights="raw").state_dict()


# --- the same bits however a step is spread


@cache
def truth() -> list[Biases]:
    return train(OVERRIDES, 3)


@pytest.mark.ranks
@pytest.mark.parametrize("how", [
    ["run.nproc=2", "parallel=ep", "train.micro_batch=6", "train.activation_checkpointing=full"],
    ["run.nproc=2", "parallel=ddp", "train.micro_batch=2",
     "train.count_pass=true", "train.activation_checkpointing=selective"]], ids=["ep", "ddp"])
def test_ranks_accumulation_and_recomputation_leave_every_bit(ranks, how):
    for found in ranks(2).run(train, [*OVERRIDES, *how], 3):
        for ours, its in zip(found, truth(), strict=True):
            assert all(its[name].any() and bias.equal(its[name]) for name, bias in ours.items())


def test_recomputation_and_accumulation_in_one_process_leave_every_bit():
    found = train([*OVERRIDES, "train.micro_batch=3", "train.activation_checkpointing=full"], 3)
    for ours, its in zip(found, truth(), strict=True):
        assert all(bias.equal(its[name]) for name, bias in ours.items())


def go_on(overrides: list[str], run_dir: Path) -> Biases:
    """Biases after the third step, of a run that begins from a save of the second."""
    run = make_run([*in_float64(2), *overrides])
    for router in run.state.model.routers.values():
        router.bias.fill_(float("nan"))
    resume(run.state, run_dir, run.mesh)
    train_step(run, 3)
    return biases_of(run)


@pytest.mark.ranks
def test_a_restart_on_another_mesh_leaves_every_bit(ranks, tmp_path):
    run = make_run([*in_float64(), *OVERRIDES])
    for step in (1, 2):
        train_step(run, step)
    save(run.state, tmp_path, run.mesh, {})
    for found in ranks(2).run(go_on, [*OVERRIDES, "parallel=ep"], tmp_path):
        assert all(bias.equal(truth()[-1][name]) for name, bias in found.items())


def test_evaluation_leaves_the_bias_alone_and_is_not_told():
    run = make_run([*in_float64(), *OVERRIDES, "eval.windows=4"])
    train_step(run, 1)
    before = biases_of(run)
    evaluate(run.state.model, run.dataset, run.mesh, run.config, step=run.state.step)
    assert all(before[name].any() and before[name].equal(bias) for name, bias in biases_of(run).items())


def test_no_sum_is_awaited_before_something_has_hidden_it(monkeypatch):
    """Forward posts the first; backward, the sums of the step and the optimizer hide one each."""
    run, events = make_run([*in_float64(), *OVERRIDES]), []

    def noted(owner, name, event):
        inner = getattr(owner, name)

        def call(*arguments, **keywords):
            if event == "wait":
                events.append(event)
            result = inner(*arguments, **keywords)
            if event != "wait":
                events.append(event)
            return result
        monkeypatch.setattr(owner, name, call)

    noted(MarginQuantiles, "_post", "post")
    noted(MarginQuantiles, "advance", "wait")
    noted(run.objective, "backward", "backward")
    noted(type(run.parallel), "reduce", "reduce")
    noted(run.state.optimizer, "step", "update")
    train_step(run, 1)
    # `advance` waits first, and posts what comes next.
    assert events == ["post", "backward", "wait", "post", "reduce", "wait", "post", "update", "wait"]
