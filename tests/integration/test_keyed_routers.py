"""A router that draws keyed random numbers trains alike on every mesh, however a step is run.

Factors: mesh, accumulation, activation checkpointing, count pass. Pairs of them here, the product with --all.
"""

from functools import cache
from itertools import product

import pytest

from tests.support.told_routers import noisy
from tests.support.training import Trained, alone, difference, in_float64, train_steps, union

STEPS = 2
MESHES = ("single", "ddp", "ep", "fsdp", "ep_fsdp", "fssdp")
PAIRS = [
    ("single", 3, "selective", True), ("ddp", 3, "none", False), ("ep", 1, "selective", True),
    ("fsdp", 3, "full", True), ("ep_fsdp", 1, "full", False), ("fssdp", 3, "none", True),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        every = product(MESHES, (1, 3), ("none", "selective", "full"), (False, True))
        cases = list(every) if metafunc.config.getoption("--all") else PAIRS
        metafunc.parametrize("case", cases, ids=lambda case: "-".join(map(str, case)))


@cache
def truth() -> Trained:
    return alone(in_float64(), STEPS, None, noisy)


@pytest.mark.ranks
def test_noise_is_the_same_on_every_mesh_and_in_every_pass(ranks, case: tuple[str, int, str, bool]) -> None:
    mesh, accumulation, checkpointing, count_pass = case
    size = 1 if mesh == "single" else 2
    given = [*in_float64(size, accumulation), f"parallel={mesh}",
             f"train.count_pass={str(count_pass).lower()}", f"train.activation_checkpointing={checkpointing}"]
    ours = (alone(given, STEPS, None, noisy) if size == 1 else
            union(ranks(size).run(train_steps, given, STEPS, None, noisy)))
    for mine, other in zip(ours.counts, truth().counts, strict=True):
        assert all(mine[name].equal(other[name]) for name in other)
    for name in ("gradients", "parameters"):
        error, tensor = difference(getattr(ours, name), getattr(truth(), name))
        assert error < 1e-10, (name, tensor, error)
    for mine, other in zip(ours.metrics, truth().metrics, strict=True):
        assert mine["loss/total"] == pytest.approx(other["loss/total"], rel=1e-10)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-10)


def test_noise_changes_choices_from_step_to_step_and_with_the_seed() -> None:
    without = alone(in_float64(), 2)
    other = alone([*in_float64(), "run.seed=1", "data.seed=0"], 1, None, noisy)
    assert truth().metrics[0]["loss/ce"] != without.metrics[0]["loss/ce"]
    counts = [step["layers.0.moe"] for step in truth().counts]
    assert not counts[0].equal(counts[1]) and not counts[0].equal(without.counts[0]["layers.0.moe"])
    assert not counts[0].equal(other.counts[0]["layers.0.moe"])
    assert not counts[0].equal(truth().counts[0]["layers.1.moe"])
