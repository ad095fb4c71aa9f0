"""FSSDP equals one process: random copies at every step, whatever holds them and however they come and go.

Every step has another random placement of copies, with rows divided by every kind of rule; with calibration
further copies come once a layer has routed, whatever they cost. float64 to 1e-10: first gradients, clipped;
norm; counts exactly; parameters after 8 steps of AdamW (20 with --all) against one process.

Memory: test_fssdp_memory.py. Resuming and checkpoints: test_fssdp_state.py.
"""

from collections.abc import Container, Iterable
from dataclasses import replace
from functools import cache

import pytest
import torch

from moetrain.errors import PeerError
from moetrain.plan.placement import LayerPlacement
from moetrain.plan.planners.base import LayerPlan
from moetrain.train.evaluation.evaluate import evaluate
from moetrain.train.step import train_step
from tests.support.random_copies import CALIBRATE, bits, run_with_copies, train_with_copies
from tests.support.training import FORCED, Trained, alone, difference, make_run, train_run, union

STEPS, MANY_STEPS = 8, 20


@pytest.fixture(scope="module")
def steps(request: pytest.FixtureRequest) -> int:
    return MANY_STEPS if request.config.getoption("--all") else STEPS


@cache
def truth(extra: tuple[str, ...], forced: bool, steps: int) -> Trained:
    return alone([*extra, "run.dtype=float64"], steps, FORCED if forced else None)


CHUNKS = ["schedule=fixed", "schedule.chunks=3"]
CASES = {
    "two": (2, [], 1, False, []),
    "two, empty ranks": (2, [], 2, True, []),
    "four, accumulated": (4, [], 4, False, []),
    "four, empty ranks": (4, [], 1, True, ["parallel.shard=2"]),
    "replicated": (4, ["parallel.ep=2"], 2, False, []),
    "kept graphs gathered again": (2, ["parallel.rematerialize=true"], 4, False, []),
    "four gathered again": (4, ["parallel.rematerialize=true"], 2, True, []),
    "recomputed": (2, ["train.activation_checkpointing=full"], 2, False, []),
    "recomputed and gathered again": (
        4, ["train.activation_checkpointing=full", "parallel.rematerialize=true"], 2, False, []),
    "selective, count pass": (2, ["train.activation_checkpointing=selective", "train.count_pass=true",
                                  "parallel.rematerialize=true"], 4, False, []),
    "homes that move": (4, ["parallel.rehome_interval=3"], 2, False, []),
    "homes that move, Muon": (2, ["parallel.rehome_interval=4"], 1, False, ["optim=muon"]),
    "homes that move, replicated": (4, ["parallel.ep=2", "parallel.rehome_interval=5"], 2, True, []),
    "uneven homes": (4, [], 1, False, ["model.num_experts=[7,3]"]),
    "sliced": (4, ["parallel.max_sliced_experts=3", "parallel.rehome_interval=4"], 2, False, []),
    "sliced, gathered again": (4, ["parallel.max_sliced_experts=2", "parallel.rehome_interval=3",
                                   "parallel.rematerialize=true"], 2, True, []),
    "sliced, replicated": (4, ["parallel.max_sliced_experts=9", "parallel.ep=2",
                               "parallel.rehome_interval=7"], 1, True, []),
    "sliced, two levels": (4, ["parallel.max_sliced_experts=2", "parallel.rehome_interval=5",
                               "parallel.collective=two_level"], 1, False, ["model.num_experts=[7,3]"]),
    "in chunks, gathered again, empty ranks": (
        2, [*CHUNKS, "schedule.chunks=4", "parallel.rematerialize=true"], 2, True, []),
    "in chunks, exact, recomputed, sliced": (4, [*CHUNKS, "parallel.exact_combine=true",
                                                 "train.activation_checkpointing=full",
                                                 "parallel.max_sliced_experts=3",
                                                 "parallel.rehome_interval=4"], 1, False, []),
    "in chunks, calibrated, selective": (2, [*CHUNKS, CALIBRATE, "train.activation_checkpointing=selective",
                                             "train.count_pass=true", "parallel.rematerialize=true"], 2,
                                         False, []),
    "tokens by two levels, in chunks": (4, [*CHUNKS, "parallel.exchange=two_level"], 2, False, []),
    "exact": (4, ["parallel.exact_combine=true"], 1, False, []),
    "two levels": (4, ["parallel.collective=two_level", "parallel.rehome_interval=6"], 2, False, []),
    "two levels, gathered again": (4, ["parallel.collective=two_level", "parallel.rematerialize=true"], 2,
                                   True, []),
    "two levels, recomputed": (4, ["parallel.collective=two_level", "train.activation_checkpointing=full"],
                               2, False, []),
    "calibrated": (4, [CALIBRATE], 1, False, []),
    "calibrated, accumulated": (2, [CALIBRATE], 4, False, []),
    "calibrated, replicated": (4, [CALIBRATE, "parallel.ep=2"], 2, False, []),
    "calibrated, gathered again": (2, [CALIBRATE, "parallel.rematerialize=true"], 4, False, []),
    "calibrated, recomputed": (2, [CALIBRATE, "train.activation_checkpointing=full"], 4, False, []),
    "calibrated, recomputed and gathered again, replicated": (
        4, [CALIBRATE, "parallel.ep=2", "train.activation_checkpointing=full",
            "parallel.rematerialize=true"], 1, False, []),
    "calibrated, selective, count pass": (2, [CALIBRATE, "train.activation_checkpointing=selective",
                                              "train.count_pass=true", "parallel.rematerialize=true"], 2,
                                          False, []),
}


# Each combines what others show one by one, or in other pairs.
FULL = ("four gathered again", "recomputed", "recomputed and gathered again", "homes that move, replicated",
        "sliced, gathered again",
        "two levels, gathered again", "two levels, recomputed", "calibrated, accumulated",
        "calibrated, gathered again", "calibrated, recomputed",
        "two, empty ranks", "kept graphs gathered again")


def but_full(cases: Iterable[str], full: Container[str]) -> list:
    return [pytest.param(case, marks=pytest.mark.full) if case in full else case for case in cases]


@pytest.mark.ranks
@pytest.mark.parametrize("case", but_full(CASES, FULL))
def test_copies_change_nothing(ranks, case, steps):
    world, overrides, accumulation, forced, extra = CASES[case]
    overrides = ["parallel=fssdp", *overrides, *extra, "run.dtype=float64", f"run.nproc={world}",
                 f"train.micro_batch={16 // world // accumulation}"]
    results = ranks(world).run(train_with_copies, overrides, steps, FORCED if forced else None, len(case))
    ours, added = union(results), [[step["moe/added_copies"] for step in result.metrics]
                                   for result in results]
    assert any(added[0]) == (CALIBRATE in overrides)
    # Groups decide by themselves
    assert (added[0] != added[-1]) == (CALIBRATE in overrides and "parallel.ep=2" in overrides)
    expected = truth(tuple(e for e in extra if e.startswith(("model", "optim"))), forced, steps)
    for what in ("gradients", "parameters"):
        error, name = difference(getattr(ours, what), getattr(expected, what))
        assert error <= 1e-10, f"{what}: {name} differs by {error:.3g} of its largest value"
    for mine, theirs in zip(ours.metrics, expected.metrics):
        for key in ("loss/ce", "loss/total", "loss/balance", "grad_norm"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-10), key
    for mine, theirs in zip(ours.counts, expected.counts):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.ranks
@pytest.mark.parametrize("case", ["four, accumulated", "four gathered again", "replicated", "recomputed"])
def test_first_gradients_in_float32_with_the_choices_fixed(ranks, case):
    """The path that ships: sums are grouped otherwise, and nothing else differs."""
    world, overrides, accumulation, _, extra = CASES[case]
    overrides = ["parallel=fssdp", *overrides, *extra, "run.dtype=float32", f"run.nproc={world}",
                 f"train.micro_batch={16 // world // accumulation}"]
    ours = union(ranks(world).run(train_with_copies, overrides, 1, FORCED, 1))
    error, name = difference(ours.gradients, alone(["run.dtype=float32"], 1, FORCED).gradients)
    assert error <= 1e-5, f"{name} differs by {error:.3g} of its largest value"


# --- every planner


# Copies always pay
FAST_LINKS = ["hardware.flops=1e6", "hardware.latency_s=0", "hardware.inside=1e12", "hardware.between=1e12"]


def planned(overrides: list[str], steps: int) -> tuple[Trained, list[int]]:
    """Training as planned, two ranks a node; and how many copies were in force at each step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", "2")
        run = make_run(overrides)
    copies = []
    run.state.planning.copies.begin, original = (
        lambda *given: (copies.append(run.state.planning.placement.num_copies), original(*given))[1],
        run.state.planning.copies.begin)
    return train_run(run, steps), copies


@pytest.mark.ranks
@pytest.mark.parametrize("planner", but_full(["ep", "hecate", "eplb", "shadow", "llep", "laer", "balanced"],
                                             ["ep", "eplb", "shadow", "laer"]))
def test_no_planner_changes_anything(ranks, planner, steps):
    overrides = ["parallel=fssdp", f"planner={planner}", *FAST_LINKS, "run.dtype=float64", "run.nproc=4",
                 "train.micro_batch=2",
                 "parallel.rehome_interval=6", "parallel.max_sliced_experts=1",
                 *["planner.min_rows=1"] * (planner == "llep")]
    results = ranks(4).run(planned, overrides, steps)
    ours, copies = union([trained for trained, _ in results]), [counts for _, counts in results]
    assert all(mine == copies[0] for mine in copies) and (max(copies[0]) > 0) == (planner != "ep")
    expected = truth((), False, steps)
    for what in ("gradients", "parameters"):
        error, name = difference(getattr(ours, what), getattr(expected, what))
        assert error <= 1e-10, f"{what}: {name} differs by {error:.3g} of its largest value"
    for mine, theirs in zip(ours.metrics, expected.metrics):
        assert all(mine[key] == pytest.approx(theirs[key], rel=1e-10)
                   for key in ("loss/ce", "loss/total", "grad_norm"))


# --- calibration


def bits_of(overrides: list[str], whole: bool) -> tuple[dict[str, bytes], int]:
    """State after three steps with some copies, and how many were added after the gate.

    whole: plan all of the copies, instead of some of them with the others added after the gate.
    """
    run, wanted = run_with_copies(overrides), ((0, 1), (1, 1), (2, 1), (5, 0), (7, 0))
    planning = run.state.planning
    planning.planner = Chosen(wanted if whole else wanted[1::2])

    def calibration(n_PE, plan, *others):
        # The step's rows, of which a micro-batch has half
        assert int(n_PE.sum()) == 16 * 12 * 2
        return None if whole else LayerPlan(
            LayerPlacement(plan.placement.home, plan.placement.positions, wanted))

    planning.calibration = calibration
    planning.restored()
    added = [train_step(run, step).metrics["moe/added_copies"] for step in (1, 2, 3)]
    return bits(run), sum(added)


class Chosen:
    rule = "local_first"

    def __init__(self, copies: tuple[tuple[int, int], ...]) -> None:
        self.copies = copies

    def plan(self, loads, homes, topology, costs, max_copies) -> LayerPlan:
        return LayerPlan(LayerPlacement(homes.home, homes.positions, self.copies))


@pytest.mark.ranks
@pytest.mark.parametrize("overrides", [[], ["parallel.rematerialize=true"]], ids=["kept", "gathered again"])
def test_copies_that_come_after_the_gate_give_the_bits_of_copies_that_were_planned(ranks, overrides):
    overrides = ["parallel=fssdp", CALIBRATE, "run.nproc=2", "train.micro_batch=4", "run.dtype=float32",
                 *overrides]
    planned, added = (ranks(2).run(bits_of, overrides, whole) for whole in (True, False))
    assert [state for state, _ in planned] == [state for state, _ in added]
    assert [count for _, count in planned] == [0, 0] and [count for _, count in added] == [3 * 2 * 3] * 2


def added_where_it_pays(overrides: list[str], forced, seconds: float) -> list[int]:
    """Copies added in two steps by the model of time, where every row takes so long to compute."""
    run = make_run(overrides, forced)
    planning = run.state.planning
    planning.planning_inputs = planning.planning_inputs._replace(
        costs={name: replace(costs, row_s=seconds) for name, costs in planning.planning_inputs.costs.items()})
    counts = []
    for step in (1, 2):
        counts.append(int(train_step(run, step).metrics["moe/added_copies"]))
        # Never adds.
        evaluate(run.state.model, run.dataset, run.mesh, run.config, step=run.state.step)
        assert run.parallel.copies.added == counts[-1]
    return counts


@pytest.mark.ranks
def test_what_nobody_expected_is_calibrated_and_what_was_planned_is_not(ranks):
    """All tokens take experts of one rank: unknown before the first step, forecast for the second."""
    overrides = ["parallel=fssdp", CALIBRATE, "run.nproc=2", "train.micro_batch=4", "eval.windows=2",
                 "parallel.max_copies=2"]
    for counts in ranks(2).run(added_where_it_pays, overrides, FORCED, 1.0):
        assert counts[0] > 0 and counts[1] == 0
    assert ranks(2).run(added_where_it_pays, overrides, FORCED, 1e-12) == [[0, 0], [0, 0]]


# --- plans that differ


def with_corrupted_loads(overrides: list[str]) -> tuple[str, int]:
    """(the error, collectives posted after it) where rank 1 has counted wrong."""
    run = run_with_copies(overrides)
    train_step(run, 1)
    if run.mesh.rank == 1:
        run.state.planning.forecaster.forecast.loads_wL += 1
    run.state.planning._plan()
    posted = []
    for layer in run.parallel.copies.banks.values():
        layer.prefetch = lambda: posted.append(1)
    try:
        train_step(run, 2)
    except PeerError as error:
        return str(error), len(posted)
    return "", len(posted)


@pytest.mark.ranks
def test_ranks_that_plan_otherwise_are_named_before_anything_is_posted(ranks):
    for error, posted in ranks(4).run(with_corrupted_loads,
                                      ["parallel=fssdp", "run.nproc=4", "train.micro_batch=4"]):
        assert error.startswith("E-PEER-002") and "rank 1 differs" in error and posted == 0
