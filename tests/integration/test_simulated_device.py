"""Training on the simulated CUDA device: the CPU's numbers on every mesh, and a golden table of host waits.

The devices compute with the CPU's kernels, so float32 differs by the order of sums alone. Waits are counted
in bfloat16, in which counts of rows stay on the device. The table is exact: a wait that is added fails the
test, and so does one that is gone.
"""

from collections import Counter
from collections.abc import Callable
from functools import cache

import pytest

from tests.support import host_waits
from tests.support.host_waits import BESIDE, CASES, MESHES, MODES, Entry
from tests.support.ranks import Ranks
from tests.support.training import Trained, alone, assert_trains_alike, make_run, train_run, union

STEPS = 2


@cache
def on_the_cpu() -> Trained:
    return alone(["run.dtype=float32"], STEPS)


def on_device(mesh: str) -> tuple[Trained, host_waits.Waits, bool]:
    """A few steps in float32; the waits of a step in bfloat16; whether the model lies on a device."""
    run = make_run([*MESHES[mesh].config, "run.device=cuda", "run.dtype=float32"])
    there = all(parameter.device.type == "cuda" for parameter in run.state.model.parameters())
    return train_run(run, STEPS), host_waits.waits_of(mesh), there


@pytest.mark.ranks
@pytest.mark.parametrize("mesh", MESHES)
def test_a_device_trains_as_the_cpu_does_and_the_host_waits_where_it_must(
        mesh: str, devices: Callable[[int], Ranks]) -> None:
    results = devices(MESHES[mesh].ranks).run(on_device, mesh)
    assert all(there for _, _, there in results)
    assert_trains_alike(union([trained for trained, _, _ in results]), on_the_cpu())
    assert not (changed := host_waits.difference(mesh, results[0][1], host_waits.read()[mesh])), changed


ALWAYS = (BESIDE, "float32")                 # of the cases on one device; the others with --all


@pytest.mark.ranks
@pytest.mark.parametrize("name", [*ALWAYS, *(pytest.param(mode, marks=pytest.mark.full)
                                             for mode in MODES if mode not in ALWAYS)])
def test_the_host_waits_where_the_table_says(name: str, devices: Callable[[int], Ranks]) -> None:
    measured = devices(CASES[name].ranks).run(host_waits.waits_of, name)[0]
    assert not (changed := host_waits.difference(name, measured, host_waits.read()[name])), changed


SUMS = Entry("sums", "train/metrics.py:sum_over", "copy to the host")
PLANS_AGREED = Entry("data", "parallel/fssdp/replanner.py:agreed", "copy to the host")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.steps])
def test_a_step_in_the_table_keeps_within_the_budget(name: str) -> None:
    case, waits = CASES[name], host_waits.read()[name]
    outside = {entry: times for entry, times in waits.items()
               if entry.place.startswith(("train/", "parallel/fssdp/replanner.py"))}
    assert outside == {SUMS: 1, **({PLANS_AGREED: 1} if "parallel=fssdp" in case.overrides else {})
                       }, "one read of one buffer"
    assert not [entry for entry in waits if entry.part == "backward"], "nothing in backward"
    assert not [entry for entry in waits
                if entry.kind in ("synchronize", "barrier")], "events, not synchronizing"
    in_layers = Counter[str]()
    for entry, times in waits.items():
        if entry not in outside:
            in_layers[entry.place] += times
    assert in_layers == case.in_layers, "one read a layer where rows travel; with one position nothing"


def test_beside_steps_the_host_waits_once_for_the_device_an_evaluation_a_save_and_a_token() -> None:
    tokens = 3
    assert host_waits.read()[BESIDE] == {
        Entry("start", "comm/device.py:take_device", "synchronize"): 1,
        Entry("evaluation", "train/evaluation/evaluate.py:_sums", "copy to the host"): 1,
        Entry("save", "train/checkpoint/snapshot.py:copies_on_host", "synchronize"): 1,
        Entry("generation", "generate/sample.py:_last", "copy to the host"): tokens}
