"""Training on several simulated devices: exchange backends, chunks and planners.

Everything equals one process on the CPU. Where a case says so, counts of rows stay on the device in float32 too, as
in bfloat16 on a GPU: those branches are then held to float32's tolerance.
"""

from functools import cache
from typing import NamedTuple

import pytest

from moetrain.model import build
from moetrain.ops import grouped_gemm
from moetrain.train.setup import Run
from tests.integration.training import Trained, alone, assert_trains_alike, make_run, train_run, union
from tests.support.simulated_device import RECORD, Wait

pytestmark = pytest.mark.ranks

STEPS = 3                        # copies come with the second or the third
CHUNKS = ["schedule=fixed", "schedule.chunks=3"]
PEER, PUSH, TWO_LEVEL = (f"parallel.exchange={name}" for name in ("peer", "peer_push", "two_level"))
CALIBRATED = "parallel.calibrate=true"
COPIES_BY_TWO = "parallel.collective=two_level"
AGAIN = "parallel.rematerialize=true"
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
    "fssdp by shadow, two levels": Case(fssdp("shadow", COPIES_BY_TWO), per_node=1),
    "fssdp by laer, calibrated": Case(fssdp("laer", CALIBRATED)),
}


def on_a_device(case: Case) -> Outcome:
    """Train on this rank's device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", str(case.per_node or case.ranks))
        for module in (build, grouped_gemm) if case.counts else ():
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
    assert all(count.device.type == "cpu" for step in trained.counts for count in step.values())     # for numpy
    return Outcome(trained, max(copies), max(sliced), dict(RECORD))


@cache
def on_the_cpu() -> Trained:
    return alone(["run.dtype=float32"], STEPS)


@pytest.mark.parametrize("case", CASES)
def test_devices_train_as_one_process_does(case: str, devices) -> None:
    results = devices(CASES[case].ranks).run(on_a_device, CASES[case])
    assert_trains_alike(union([result.trained for result in results]), on_the_cpu())
    overrides = CASES[case].overrides
    assert (results[0].copies > 0) == ("parallel=fssdp" in overrides and "planner=ep" not in overrides)
    assert (results[0].sliced > 0) == ("parallel.sliced=1" in overrides)
    assert waits_in(results, "ops/peer_memory.py") <= {"read"}       # of signals


def waits_in(results: list[Outcome], places: str) -> set[str]:
    """Kinds of waits in files of a beginning."""
    return {wait.kind for result in results for wait in result.waits if wait.place.startswith(places)}
