"""Training on several simulated devices: exchange backends, chunks, planners, a shared GPU, resuming.

A run resumes on another mesh. Everything equals one process on the CPU. Where a case says so, counts of rows
stay on the device in float32 too, as in bfloat16 on a GPU: those branches are then held to float32's
tolerance.
"""

import os
import warnings
from functools import cache
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from moetrain.comm.mesh import disconnect
from moetrain.moe import expert_form
from moetrain.ops import grouped_gemm
from moetrain.train.checkpoint.load import resume
from moetrain.train.checkpoint.save import save
from moetrain.train.state import Run
from moetrain.train.step import train_step
from tests.support.ranks import free_port
from tests.support.simulated_device import RECORD, Wait
from tests.support.training import (
    Held,
    Trained,
    alone,
    assert_trains_alike,
    difference,
    make_run,
    snapshot,
    train_run,
    union,
    whole,
)

pytestmark = pytest.mark.ranks

STEPS = 3                        # copies come with the second or the third
CHUNKS = ["schedule=fixed", "schedule.chunks=3"]
SLICED = ["parallel.max_sliced_experts=1", "parallel.rehome_interval=2"]
PEER, PUSH, TWO_LEVEL = (f"parallel.exchange={name}" for name in ("peer", "peer_push", "two_level"))
CALIBRATED = "parallel.calibrate=true"
COPIES_BY_TWO = "parallel.collective=two_level"
AGAIN, RECOMPUTED = "parallel.rematerialize=true", "train.activation_checkpointing=full"
# Copies always pay.
COPIES = ["hardware.flops=1e6", "hardware.latency_s=0", "hardware.inside=1e12", "hardware.between=1e12"]
ON_DEVICE = ["run.device=cuda", "run.dtype=float32"]


class Case(NamedTuple):
    overrides: list[str]
    ranks: int = 2
    per_node: int = 0            # ranks of a node; 0: all
    counts: bool = True          # stay on the device


class Outcome(NamedTuple):
    trained: Trained
    copies: int                  # the most in force at a step
    sliced: int                  # experts cut up, the most at a step
    waits: dict[Wait, int]       # of all steps


def fssdp(planner: str, *overrides: str) -> list[str]:
    return ["parallel=fssdp", f"planner={planner}", *COPIES, *overrides]


CASES = {
    "ep, exact combine, in chunks": Case(["parallel=ep", *CHUNKS, "parallel.exact_combine=true"]),
    "ep, peer, in chunks": Case(["parallel=ep", *CHUNKS, PEER]),
    "ep, two levels": Case(["parallel=ep", TWO_LEVEL], per_node=1),
    "fssdp by ep": Case(fssdp("ep", "parallel.exact_combine=true")),
    "fssdp by hecate, peer_push, gathered again": Case(fssdp("hecate", PUSH, AGAIN)),
    "fssdp by eplb, sliced, in chunks": Case(fssdp("eplb", *CHUNKS, *SLICED)),
    "fssdp by shadow, two levels": Case(fssdp("shadow", COPIES_BY_TWO), per_node=1),
    "fssdp by llep": Case(fssdp("llep", "planner.min_rows=1", "planner.threshold=0.1",
                                "planner.capacity=1.0")),
    "fssdp by laer, calibrated": Case(fssdp("laer", CALIBRATED)),
    "fssdp by balanced": Case(fssdp("balanced", "planner.tolerance=0", "planner.min_gain=0")),
}
PRODUCTS = {
    "four, ep, two levels, in chunks": Case(["parallel=ep", *CHUNKS, TWO_LEVEL], ranks=4, per_node=2),
    "four, ep_fsdp, peer": Case(["parallel=ep_fsdp", "parallel.ep=2", PEER], ranks=4),
    "four, fssdp, replicated, two levels": Case(
        fssdp("hecate", "parallel.ep=2", TWO_LEVEL, COPIES_BY_TWO), ranks=4, per_node=2),
    "four, fssdp, everything": Case(
        fssdp("hecate", *CHUNKS, *SLICED, TWO_LEVEL, AGAIN, RECOMPUTED), ranks=4, per_node=2),
    "peer, recomputed": Case(["parallel=ep", PEER, RECOMPUTED]),
    "peer, counts on the host": Case(["parallel=ep", *CHUNKS, PEER], counts=False),
    "sliced, counts on the host": Case(fssdp("laer", *SLICED), counts=False),
    **{f"fssdp by {planner}, gathered again, peer": Case(fssdp(planner, AGAIN, PEER))
       for planner in ("eplb", "laer", "shadow")},
}
EVERY = CASES | PRODUCTS


def on_a_device(case: Case) -> Outcome:
    """Train on this rank's device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", str(case.per_node or case.ranks))
        for module in (expert_form, grouped_gemm) if case.counts else ():
            patch.setattr(module, "takes_counts_on_device", lambda device, *_: device.type == "cuda")
        sizes = [f"run.nproc={case.ranks}", f"train.micro_batch={16 // case.ranks}"]
        return outcome(make_run([*case.overrides, *ON_DEVICE, *sizes]))


def outcome(run: Run) -> Outcome:
    """Train, and watch what is planned and where the host waits."""
    assert run.mesh.device.type == "cuda"
    assert all(parameter.device == run.mesh.device for parameter in run.state.model.parameters())
    copies, sliced, planning = [0], [0], run.state.planning

    def begun(*given, original=planning and planning.copies.begin):
        copies.append(planning.placement.num_copies)
        sliced.append(sum(len(layer.sliced) for _, layer in planning.placement.layers))
        return original(*given)

    if planning:
        planning.copies.begin = begun
    RECORD.clear()
    trained = train_run(run, STEPS)
    # For numpy
    assert all(count.device.type == "cpu" for step in trained.counts for count in step.values())
    return Outcome(trained, max(copies), max(sliced), dict(RECORD))


@cache
def on_the_cpu(steps: int = STEPS) -> Trained:
    return alone(["run.dtype=float32"], steps)


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.full) for case in PRODUCTS)])
def test_devices_train_as_one_process_does(case: str, devices) -> None:
    results = devices(EVERY[case].ranks).run(on_a_device, EVERY[case])
    assert_trains_alike(union([result.trained for result in results]), on_the_cpu())
    overrides = EVERY[case].overrides
    assert (results[0].copies > 0) == ("parallel=fssdp" in overrides and "planner=ep" not in overrides)
    assert (results[0].sliced > 0) == ("parallel.max_sliced_experts=1" in overrides)
    assert waits_in(results, "ops/peer_memory.py") <= {"read"}       # of signals


def waits_in(results: list[Outcome], places: str) -> set[str]:
    """Kinds of waits in files of a beginning."""
    return {wait.kind for result in results for wait in result.waits if wait.place.startswith(places)}


# --- ranks that share a device; groups of nccl, as a run makes them


def joined_anew(overrides: list[str], port: int, device_of_all: int | None) -> Outcome:
    """Train over a group that the run makes itself.

    device_of_all: index of the device, where there is only one.
    """
    dist.destroy_process_group()
    # A store of its own: in that of the tests there are addresses of groups of the same name.
    with mock.patch.dict(os.environ, {"MASTER_PORT": str(port)}), pytest.MonkeyPatch.context() as patch:
        if device_of_all is not None:
            patch.setattr(torch.cuda, "device_count", lambda: 1)
        run = make_run([*overrides, *ON_DEVICE, "run.nproc=2", "train.micro_batch=8"])
        assert dist.get_backend() == ("nccl" if device_of_all is None else "gloo")
        assert device_of_all is None or run.mesh.device.index == device_of_all
        result = outcome(run)
        with warnings.catch_warnings(action="error"):
            disconnect()                                             # nothing on the terminal at the end
    return result


@pytest.mark.parametrize("overrides", [["parallel=ep", PEER], fssdp("hecate")], ids=["ep", "fssdp"])
def test_ranks_that_share_a_device_train_as_one_process_does(overrides: list[str], devices) -> None:
    results = devices(2).run(joined_anew, [*overrides, "run.share_gpu=true"], free_port(), 0)
    assert_trains_alike(union([result.trained for result in results]), on_the_cpu())
    assert "read" not in waits_in(results, "ops/grouped_gemm.py")    # in float32 the host knows the counts


def test_a_group_of_nccl_is_told_its_device(devices) -> None:
    """Otherwise torch guesses one for a barrier, and says so at the end of every run."""
    results = devices(2).run(joined_anew, ["parallel=ep"], free_port(), None)
    assert_trains_alike(union([result.trained for result in results]), on_the_cpu())


# --- a checkpoint of one mesh goes on on another


def saved_after(steps: int, overrides: list[str], resumed: Path | None,
                target: Path) -> tuple[Held, Held, list[dict[str, float]]]:
    """Train to a step, from a checkpoint if there is one.

    Returns:
        Parameters as loaded, parameters at the end, and metrics.
    """
    run = make_run([*overrides, "run.dtype=float32"])
    first = 1
    if resumed is not None:
        for shard in run.state.state_shards():
            shard.rows.fill_(float("nan") if shard.rows.is_floating_point() else -1)
        first += int(resume(run.state, resumed, run.mesh).path.name.removeprefix("step-"))
    loaded = snapshot(run, lambda parameter: parameter.data)
    metrics = [train_step(run, step).metrics for step in range(first, steps + 1)]
    RECORD.clear()
    save(run.state, target, run.mesh, {})
    snapshot_py = "train/checkpoint/snapshot.py"
    waits = {wait.kind: times for wait, times in RECORD.items() if wait.place.startswith(snapshot_py)}
    assert run.mesh.device.type == "cpu" or waits == {"synchronize": 1}, waits          # not one a shard
    return loaded, snapshot(run, lambda parameter: parameter.data), metrics


MODES = {"ddp": ["parallel=ddp"], "ep": ["parallel=ep"], "fsdp": ["parallel=fsdp"],
         "ep_fsdp": ["parallel=ep_fsdp"],
         "fssdp": fssdp("hecate")}
CHAINS = [("fsdp", "fssdp"), *(pytest.param(pair, marks=pytest.mark.full) for pair in
                               [("ep", "fsdp"), ("fssdp", "ep_fsdp"), ("ep_fsdp", "ddp"), ("ddp", "ep")])]


@pytest.mark.parametrize("chain", CHAINS, ids="-".join)
def test_a_checkpoint_goes_on_on_other_devices_and_on_the_cpu(
        chain: tuple[str, str], devices, tmp_path) -> None:
    """One step on each, and one on the CPU: what one process does in three."""
    first, second = ([*MODES[mode], "run.device=cuda", "run.nproc=2", "train.micro_batch=8"]
                     for mode in chain)
    begun = devices(2).run(saved_after, 1, first, None, tmp_path / "first")
    onward = devices(2).run(saved_after, 2, second, tmp_path / "first", tmp_path / "second")
    last = [saved_after(3, [], tmp_path / "second", tmp_path / "third")]
    for before, after in ((begun, onward), (onward, last)):
        saved, loaded = whole([held for _, held, _ in before]), whole([held for held, _, _ in after])
        assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())
    assert difference(whole([last[0][1]]), on_the_cpu(3).parameters)[0] < 1e-3
    for results, theirs in zip([begun, onward, last], on_the_cpu(3).metrics, strict=True):
        for name in ("loss/ce", "grad_norm"):
            assert results[0][2][0][name] == pytest.approx(theirs[name], rel=1e-5), name
