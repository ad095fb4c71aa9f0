"""State of FSSDP: runs resume to the bit, homes that moved are saved, nothing that a step changes is lost."""

from pathlib import Path

import pytest
import torch

from moetrain.parallel.fssdp.replanner import Replanner
from moetrain.train.checkpoint.load import load, resume
from moetrain.train.checkpoint.save import save
from moetrain.train.state import Run
from moetrain.train.step import train_step
from tests.support.random_copies import CALIBRATE, bits, numbers, run_with_copies
from tests.support.training import make_run, whole
from tests.support.unsaved_state import unsaved

# Which groups sums otherwise than pieces do
SLICED = ["planner=eplb", "parallel.max_sliced_experts=3", "parallel.collective=two_level"]


def resumed(overrides: list[str], directory: Path) -> tuple[list, list]:
    """Metrics and state at the end of 10 steps: in one go, and by a run that loads a save after step 6."""
    run = run_with_copies(overrides)
    first = []
    for step in range(1, 11):
        first.append(numbers(train_step(run, step).metrics))
        if step == 6:
            path = save(run.state, directory, run.mesh, {})
    again = run_with_copies(overrides)
    load(again.state, path, mesh=again.mesh)
    second = [numbers(train_step(again, step).metrics) for step in range(7, 11)]
    return [first[6:], bits(run)], [second, bits(again)]


@pytest.mark.ranks
@pytest.mark.parametrize("forget, more", [
    ("", SLICED), ("", ["parallel.forecast=trend", "parallel.max_forecast_error=0.03", CALIBRATE]),
    ("plan.homes", []), *(pytest.param(*case, marks=pytest.mark.full) for case in (
        ("", []), ("plan.loads", []), ("plan.sliced", SLICED), ("plan.slope", ["parallel.forecast=trend"]),
        ("plan.errors", ["parallel.max_forecast_error=0.03"])))])
def test_resuming_gives_the_same_bits_and_needs_forecast_and_homes(ranks, tmp_path, forget, more):
    overrides = ["parallel=fssdp", "run.nproc=4", "train.micro_batch=2", "parallel.rehome_interval=3",
                 "run.dtype=float32", *more]
    for unbroken, again in ranks(4).run(resumed_without, overrides, tmp_path, forget):
        assert (unbroken == again) == (not forget)


def resumed_without(overrides: list[str], directory: Path, forget: str) -> tuple[list, list]:
    def state_shards(planning, original=Replanner.state_shards):
        yield from (shard for shard in original(planning) if shard.name != forget)

    original, Replanner.state_shards = Replanner.state_shards, state_shards
    try:
        return resumed(overrides, directory)
    finally:
        Replanner.state_shards = original


def save_moved(overrides: list[str], run_dir: Path) -> dict:
    run = run_with_copies(overrides)
    for step in range(1, 4):
        train_step(run, step)
    save(run.state, run_dir, run.mesh, {})
    return held(run)


def load_elsewhere(overrides: list[str], run_dir: Path) -> dict:
    run = make_run(overrides)
    resume(run.state, run_dir, run.mesh)
    return held(run)


def held(run: Run) -> dict:
    return {shard.name: (tuple(shard.shape), shard.begin, shard.rows.detach().clone())
            for shard in run.state.state_shards()
            if not shard.name.startswith("plan.")}


SLICED4 = (4, ["parallel=fssdp", "planner=eplb", "parallel.max_sliced_experts=3",
               "parallel.rehome_interval=2"])
ELSEWHERE = {"single": (1, []), "ep2": (2, ["parallel=ep"]),
             "ep2_fsdp4": (4, ["parallel=ep_fsdp", "parallel.ep=2"]),
             "fsdp4": (4, ["parallel=fsdp"]), "fssdp4": (4, ["parallel=fssdp"]),
             "fssdp2": (2, ["parallel=fssdp"]), "sliced4": SLICED4,
             "sliced2": (2, [*SLICED4[1], "parallel.max_sliced_experts=1"])}


@pytest.mark.ranks
@pytest.mark.parametrize("sliced", [0, 3])
def test_a_checkpoint_of_homes_that_moved_loads_anywhere_to_the_bit(ranks, tmp_path, sliced):
    moved = ["parallel=fssdp", "run.nproc=4", "train.micro_batch=4", "parallel.rehome_interval=2",
             f"parallel.max_sliced_experts={sliced}",
             "planner=eplb"]
    held_by = ranks(4).run(save_moved, moved, tmp_path)
    in_pieces = {name for held in held_by for name, (shape, _, rows) in held.items()
                 if "experts" in name and len(rows) < shape[0]}
    assert len(in_pieces) == 2 * sliced * 2 * 3          # layers, matrices, parameter and moments
    truth = whole(held_by)
    for name, (world, overrides) in ELSEWHERE.items():
        overrides = [*overrides, f"run.nproc={world}", f"train.micro_batch={16 // world}"]
        loaded = whole([load_elsewhere(overrides, tmp_path)] if world == 1
                       else ranks(world).run(load_elsewhere, overrides, tmp_path))
        assert loaded.keys() == truth.keys()
        assert all(torch.equal(loaded[tensor], truth[tensor]) for tensor in truth), name


def experts_here(overrides: list[str], run_dir: Path) -> int:
    run = make_run(overrides)
    resume(run.state, run_dir, run.mesh)
    return sum(name.endswith("gate_up") and name.startswith("model.") and ".experts." in name
               for name in held(run))


@pytest.mark.ranks
@pytest.mark.parametrize("says", [True, False], ids=["", "older release"])
def test_a_run_resumed_on_more_ranks_spreads_its_homes_over_all(ranks, tmp_path, says):
    overrides = ["parallel=fssdp", "planner=eplb", "parallel.rehome_interval=2"]
    ranks(2).run(save_moved if says else save_without_positions,
                 [*overrides, "run.nproc=2", "train.micro_batch=8"], tmp_path)
    on_four = ranks(4).run(experts_here, [*overrides, "run.nproc=4", "train.micro_batch=4"], tmp_path)
    assert on_four == [2 * 8 // 4] * 4                           # layers x experts


def save_without_positions(overrides: list[str], run_dir: Path) -> None:
    def state_shards(planning, original=Replanner.state_shards):
        yield from (shard for shard in original(planning) if shard.name != "plan.positions")

    original, Replanner.state_shards = Replanner.state_shards, state_shards
    try:
        save_moved(overrides, run_dir)
    finally:
        Replanner.state_shards = original


def unsaved_with_copies(overrides: list[str]) -> list[str]:
    # Random's own
    return [path for path in unsaved(run_with_copies(overrides)) if not path.endswith("planner.rule")]


@pytest.mark.ranks
@pytest.mark.parametrize("more", [
    [], ["parallel.max_sliced_experts=2"], [CALIBRATE, "parallel.forecast=trend"],
], ids=["planned", "sliced", "calibrated"])
def test_what_a_step_with_copies_changes_is_saved_or_rebuilt(ranks, more):
    assert ranks(2).run(unsaved_with_copies, ["parallel=fssdp", "parallel.shard=1", "run.nproc=2",
                                              "train.micro_batch=4",
                                              "parallel.rehome_interval=2", *more]) == [[], []]
