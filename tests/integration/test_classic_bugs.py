"""The classic bugs of the field, each put back and caught.

Every test first shows that the code as it is agrees with one process. It then puts the bug back on the ranks
and shows that the same comparison fails: the comparison can see it.
"""

import contextlib
from unittest.mock import patch

import pytest
import torch

from moetrain.comm.reduce import sum_over
from moetrain.losses.base import Pooled
from tests.support.training import Trained, alone, difference, train_steps, union

EP2 = ["run.dtype=float64", "run.nproc=2", "parallel=ep", "train.micro_batch=4", "data.min_length=0.3",
       "balance.weight=1.0"]
SERIAL = ["run.dtype=float64", "data.min_length=0.3", "balance.weight=1.0"]


def with_bug(bug: str, steps: int) -> Trained:
    """Training with one of the bugs below put back, on this rank."""
    from moetrain.parallel import grad_norm as expert
    from moetrain.routers import base
    from moetrain.train import count_pool as pool_module, micro_batches as passes, step as step_module

    def experts_repeated(reduce):
        def wrong(self):
            reduce(self)
            for parameter in self.parts[1][0]:
                parameter.grad.mul_(2)                   # summed over ep as if experts were replicated there
        return wrong

    def square_sum(parameters, mesh):
        return expert._square_sum(parameters, mesh.device)

    def norm_without_experts(dense, experts, mesh):
        return square_sum(dense, mesh).sqrt()

    def norm_with_experts_repeated(dense, experts, mesh):
        return (square_sum(dense, mesh) + 2 * sum_over(mesh["ep"], square_sum(experts, mesh))).sqrt()

    def local_norm(dense, experts, mesh):
        return (square_sum(dense, mesh) + square_sum(experts, mesh)).sqrt()

    pool = passes.pool

    def pooled_by_ranks(*arguments):
        return [Pooled(p.counts_E, p.tokens // 2) for p in pool(*arguments)]

    def pooled_by_micro_batch(*arguments):
        return [Pooled(p.counts_E, p.counts_E[0].sum() // 2 // 4) for p in pool(*arguments)]

    sums = base.router_sums

    def with_padding(probs_TE, logits_TE, ids_TK, valid_T, offsets=None):
        return sums(probs_TE, logits_TE, ids_TK, None, offsets)._replace(
            counts_E=sums(probs_TE, logits_TE, ids_TK, valid_T).counts_E)

    def averaged(reduce):
        def wrong(self):
            reduce(self)
            for parameters, group in self.parts:
                for parameter in parameters:
                    parameter.grad.div_(group.size)
        return wrong

    from moetrain.parallel.data_parallel import GradientReducer as Reducer
    bugs = {
        "none": contextlib.nullcontext, "none, injected": contextlib.nullcontext,
        "expert gradients ep times too large":
            lambda: patch.object(Reducer, "reduce", experts_repeated(Reducer.reduce)),
        "norm omits experts": lambda: patch.object(step_module, "global_norm", norm_without_experts),
        "norm repeats experts": lambda: patch.object(step_module, "global_norm", norm_with_experts_repeated),
        "norm of local experts": lambda: patch.object(step_module, "global_norm", local_norm),
        "balance loss scaled by ranks": lambda: patch.object(passes, "pool", pooled_by_ranks),
        "f from local counts":
            lambda: patch.object(pool_module, "sum_over_async", lambda group, tensor: lambda: tensor),
        "the micro-batch's tokens as denominator":
            lambda: patch.object(passes, "pool", pooled_by_micro_batch),
        "padding in the sums": lambda: patch.object(base, "router_sums", with_padding),
        "the injecting node's result lost":
            lambda: patch.object(passes, "attach", lambda x, stats, slopes: x),
        "gradients averaged": lambda: patch.object(Reducer, "reduce", averaged(Reducer.reduce)),
    }
    with bugs[bug]():
        return train_steps([*EP2, *(["train.aux_loss=injected"] if "inject" in bug else [])], steps)


def error(bug: str, ranks) -> float:
    """Largest difference to one process over gradients, norms and balance loss of the first step."""
    results = ranks(2).run(with_bug, bug, 1)
    if bug == "norm of local experts":                   # ranks disagree: that is the failure
        return abs(results[0].metrics[0]["grad_norm"] - results[1].metrics[0]["grad_norm"])
    ours, truth = union(results), alone(SERIAL, 1)
    scalars = max(abs(ours.metrics[0][key] - truth.metrics[0][key])
                  for key in ("grad_norm", "loss/balance", "loss/total"))
    return max(difference(ours.gradients, truth.gradients)[0], scalars)


@pytest.mark.ranks
@pytest.mark.parametrize("bug", ["none", "none, injected"])
def test_without_a_bug_two_ranks_equal_one(ranks, bug):
    assert error(bug, ranks) <= 1e-10


@pytest.mark.ranks
@pytest.mark.parametrize("bug", [
    "expert gradients ep times too large", "norm omits experts", "norm repeats experts",
    "norm of local experts", "balance loss scaled by ranks", "f from local counts",
    "the micro-batch's tokens as denominator", "padding in the sums",
    "the injecting node's result lost", "gradients averaged",
])
def test_the_comparison_sees(ranks, bug):
    assert error(bug, ranks) > 1e-6


def test_the_wrong_denominator_is_seen_under_accumulation():
    """f from the counts of the current micro-batch alone: the router's gradient is another one."""
    accumulated = [*SERIAL, "train.micro_batch=4"]
    exact, micro, whole = (alone(overrides, 1) for overrides in
                           (accumulated, [*accumulated, "balance=micro", "balance.weight=1.0"], SERIAL))
    router = "layers.0.moe.router.weight"
    scale = whole.gradients[router].abs().max()
    assert (exact.gradients[router] - whole.gradients[router]).abs().max() / scale <= 1e-10
    assert (micro.gradients[router] - whole.gradients[router]).abs().max() / scale > 1e-4
    assert torch.isclose(torch.tensor(exact.metrics[0]["loss/balance"]),
                         torch.tensor(whole.metrics[0]["loss/balance"]))
