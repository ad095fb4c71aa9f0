"""Every router of conf/router/ and every architecture trains alike on every mesh, however a step is run.

Factors: router or architecture, mesh, accumulation, activation checkpointing, count pass. Each subject meets
two meshes here, with the other factors in rotation; all meshes, with all other factors, behind --all.

float64 to 1e-10 against the same training in one process: counts exactly, first gradients, losses and norms
of all steps, parameters after the last. float32 through the path that ships, first gradients at 2e-5.
"""

from functools import cache
from itertools import product

import pytest

from tests.support.any_router import SUBJECTS, Subject
from tests.support.training import (
    Trained,
    alone,
    assert_trains_alike,
    difference,
    in_float64,
    train_steps,
    union,
)

STEPS = 3
MESHES = ("ep", "fssdp", "ddp", "ep_fsdp", "single", "fsdp")
HOW = list(product(("none", "full", "selective"), (4, 1), (False, True)))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        every = metafunc.config.getoption("--all")
        cases = list(product(SUBJECTS, MESHES, HOW)) if every else list(rotated())
        metafunc.parametrize("case", cases, ids=[
            "-".join(map(str, (subject.name, mesh, *how))) for subject, mesh, how in cases])


def rotated():
    """Two meshes for each subject, one of them with experts on several ranks."""
    for number, subject in enumerate(SUBJECTS):
        for turn, mesh in enumerate((MESHES[number % 2], MESHES[2 + number % 4])):
            yield subject, mesh, HOW[(5 * number + 7 * turn) % len(HOW)]


def overrides_of(case: tuple[Subject, str, tuple[str, int, bool]]) -> tuple[int, list[str]]:
    """Ranks of a case, and its overrides."""
    subject, mesh, (checkpointing, accumulation, count_pass) = case
    size = 1 if mesh == "single" else 2
    micro = 8 // size // (accumulation if size * accumulation <= 8 else 1)
    return size, [*subject.overrides, f"run.nproc={size}", f"train.micro_batch={micro}", f"parallel={mesh}",
                  f"train.count_pass={str(count_pass).lower()}",
                  f"train.activation_checkpointing={checkpointing}"]


def trained(ranks, case, dtype: str) -> Trained:
    size, overrides = overrides_of(case)
    given = [*in_float64(), "train.global_batch=8", *overrides, f"run.dtype={dtype}"]
    return (alone(given, STEPS) if size == 1 else union(ranks(size).run(train_steps, given, STEPS)))


@cache
def truth(subject: Subject, dtype: str = "float64") -> Trained:
    return alone([*in_float64(), "train.global_batch=8", "train.micro_batch=8", *subject.overrides,
                  f"run.dtype={dtype}"], STEPS)


@pytest.mark.ranks
def test_numbers_do_not_depend_on_how_a_step_is_spread(ranks, case) -> None:
    ours, expected = trained(ranks, case, "float64"), truth(case[0])
    for mine, other in zip(ours.counts, expected.counts, strict=True):
        assert mine.keys() == other.keys() and all(mine[name].equal(other[name]) for name in other)
    for name in ("gradients", "parameters"):
        error, tensor = difference(getattr(ours, name), getattr(expected, name))
        assert error < 1e-10, (name, tensor, error)
    for mine, other in zip(ours.metrics, expected.metrics, strict=True):
        for name in ("loss/total", "loss/ce", "loss/balance", "grad_norm"):
            assert mine[name] == pytest.approx(other[name], rel=1e-10, abs=1e-13), name


@pytest.mark.ranks
@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_float32_of_two_ranks_differs_by_the_order_of_sums(ranks, subject) -> None:
    case = (subject, "ep", ("none", 1, False))
    assert_trains_alike(trained(ranks, case, "float32"), truth(subject, "float32"))


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_what_is_trained_moves(subject) -> None:
    steps = truth(subject).metrics
    assert steps[0]["loss/ce"] != steps[-1]["loss/ce"] and steps[0]["grad_norm"] > 0
    idle = {f"{router}.experts.{expert}" for router, counts_C in truth(subject).counts[0].items()
            for expert in (counts_C == 0).nonzero().flatten().tolist()}
    still = [name for name, grad in truth(subject).gradients.items()
             if not grad.any() and name.rpartition(".")[0] not in idle]
    assert set(still) <= set(subject.still), still
