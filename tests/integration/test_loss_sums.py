"""Losses of sums that a loss or a router brings, and of sums that are pooled before backward.

First choices, the importance loss (CV^2), mutual information of tokens and experts, a sum of the router's
own: equal on every mesh, however the batch is split, added to the loss or injected in backward. Pairs of
factors here, the product with --all. tests/losses/test_sums.py has them against autograd.
"""

from functools import cache
from itertools import product

import pytest

from tests.support.sum_losses import add_losses
from tests.support.training import (
    Trained,
    checked_records,
    difference,
    make_run,
    train_run,
    train_steps,
    union,
)

STEPS = 2
BASE = ["run.dtype=float64", "train.global_batch=12", "train.micro_batch=12", "data.min_length=0.5"]
MESHES = {"single": 1, "ddp": 2, "ep": 2, "fsdp": 2, "ep_fsdp": 2, "fssdp": 2}
PASSES = {"none": [], "full": ["train.activation_checkpointing=full"],
          "selective": ["train.activation_checkpointing=selective"], "count": ["train.count_pass=true"]}
FACTORS = {"mesh": list(MESHES), "accumulation": [1, 3], "way": ["added", "injected"], "passes": list(PASSES)}
# Every pair of values of two factors occurs, but for a count pass without accumulation, which does nothing.
PAIRS = [
    ("single", 3, "injected", "count"), ("single", 1, "injected", "full"), ("ddp", 3, "added", "count"),
    ("ddp", 1, "injected", "selective"), ("ep", 3, "injected", "none"), ("ep", 1, "added", "full"),
    ("fsdp", 3, "added", "selective"), ("fsdp", 1, "injected", "none"), ("ep_fsdp", 3, "injected", "full"),
    ("fssdp", 3, "added", "count"), ("fssdp", 1, "injected", "selective"),
]
LOSSES = ("first", "importance", "mi", "peak")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = list(product(*FACTORS.values())) if metafunc.config.getoption("--all") else PAIRS
        metafunc.parametrize("case", cases, ids=lambda case: "-".join(map(str, case)))


def trained(overrides: list[str], mode: str = "exact") -> Trained:
    with checked_records():
        return train_run(add_losses(make_run([*BASE, *overrides]), mode), STEPS)


@cache
def truth() -> Trained:
    return union([trained([])])


@pytest.mark.ranks
def test_they_train_as_in_one_process(ranks, case):
    mesh, accumulation, way, passes = case
    world = MESHES[mesh]
    overrides = [f"parallel={mesh}", f"run.nproc={world}", f"train.aux_loss={way}", *PASSES[passes],
                 f"train.micro_batch={12 // world // accumulation}"]
    assert_alike(union([trained(overrides)] if world == 1 else ranks(world).run(trained, overrides)), truth())


@pytest.mark.ranks
@pytest.mark.parametrize("mode", ["sync", "buffer"])
def test_other_modes_pool_over_ranks(ranks, mode):
    """Without accumulation they are the exact one; with it they are the same on one rank and on two."""
    words = [f"balance.mode={mode}", "parallel=ddp", "run.nproc=2"]
    assert_alike(union(ranks(2).run(trained, [*words, "train.micro_batch=6"], mode)), truth())
    ours = union(ranks(2).run(trained, [*words, "train.micro_batch=2"], mode))
    assert_alike(ours, union([trained([words[0], "train.micro_batch=4"], mode)]))


def assert_alike(ours: Trained, theirs: Trained) -> None:
    for name in ("gradients", "parameters"):
        error, tensor = difference(getattr(ours, name), getattr(theirs, name))
        assert error < 1e-10, (name, tensor, error)
    for mine, other in zip(ours.metrics, theirs.metrics, strict=True):
        for name in ("loss/total", "moe/first_share", *(f"loss/{loss}" for loss in LOSSES)):
            assert mine[name] == pytest.approx(other[name], rel=1e-11), name


def test_a_loss_brings_its_value_and_metrics_of_its_own():
    first = truth().metrics[0]
    for loss in LOSSES:
        assert abs(first[f"loss/{loss}"]) > 1e-3
        assert first[f"loss/weighted/{loss}"] == pytest.approx(
            first[f"loss/{loss}"] * {"first": 0.3, "importance": 0.2, "mi": 0.5, "peak": 0.4}[loss])
    assert 1 / 8 < first["moe/first_share"] < 1


def test_they_change_what_is_trained():
    plain = union([train_steps(BASE, STEPS)])
    assert difference(truth().gradients, plain.gradients)[0] > 1e-3


def test_sums_that_the_previous_step_would_have_to_stand_for_are_refused():
    with pytest.raises(AssertionError, match="cannot be estimated by the previous step"):
        trained(["balance.mode=warm", "train.micro_batch=4"], "warm")
