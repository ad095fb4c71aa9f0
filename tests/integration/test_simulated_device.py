"""Training on the simulated CUDA device: the CPU's numbers on every mesh, and a budget of host waits.

The devices compute with the CPU's kernels, so float32 differs by the order of sums alone. Waits are counted in the third step
in bfloat16, in which counts of rows stay on the device. BUDGET is exact: a wait that is added fails the test, and so does one
that is gone, until it is taken out here.
"""

from collections import Counter
from collections.abc import Callable

import pytest

from moetrain.train.step import train_step
from tests.integration.training import Trained, alone, assert_trains_alike, make_run, train_steps, union
from tests.ranks import Ranks
from tests.support import simulated_device

pytestmark = pytest.mark.ranks

STEPS = 2
LAYERS = 2                                   # of the tiny model, each with experts
MESHES: dict[str, tuple[int, list[str]]] = {
    "single": (1, ["parallel=single"]),
    "ddp": (2, ["parallel=ddp"]),
    "ep": (2, ["parallel=ep"]),
    "fsdp": (2, ["parallel=fsdp"]),
    "ep_fsdp": (2, ["parallel=ep_fsdp"]),
    "fssdp": (2, ["parallel=fssdp", "planner=shadow"]),
}
SUMS, VALID = "train/metrics.py:sum_over: copy to the host", "train/step.py:read_batches: read"
SPLITS = {"moe/dispatch.py:_courses: copy to the host": LAYERS}
BUDGET: dict[str, dict[str, int]] = {
    "single": {SUMS: 1, VALID: 1},
    "ddp": {SUMS: 1, VALID: 1},
    "ep": {SUMS: 1, VALID: 1, **SPLITS},
    "fsdp": {SUMS: 1, VALID: 1},
    "ep_fsdp": {SUMS: 1, VALID: 1, **SPLITS},
    "fssdp": {SUMS: 1, VALID: 1, **SPLITS, "train/planning.py:agreed: copy to the host": 1},
}


def on_device(overrides: list[str]) -> tuple[Trained, dict[str, int], bool]:
    """A few steps in float32; where the host waits in the third step in bfloat16; whether the model lies on a device."""
    overrides = [*overrides, "run.device=cuda"]
    trained = train_steps([*overrides, "run.dtype=float32"], STEPS)
    run = make_run([*overrides, "run.dtype=bfloat16"])
    for step in (1, 2, 3):
        simulated_device.RECORD.clear()
        train_step(run, step)
    waits: Counter[str] = Counter()
    for wait, times in simulated_device.RECORD.items():
        waits[f"{'backward of ' * wait.backward}{wait.place}: {wait.kind}"] += times
    return trained, dict(waits), all(parameter.device.type == "cuda" for parameter in run.state.model.parameters())


@pytest.mark.parametrize("mesh", MESHES)
def test_a_device_trains_as_the_cpu_does_and_the_host_waits_where_it_must(mesh: str, devices: Callable[[int], Ranks]) -> None:
    size, overrides = MESHES[mesh]
    results = devices(size).run(on_device, [*overrides, f"train.micro_batch={16 // size}"])
    ours, theirs = union([trained for trained, _, _ in results]), alone(["run.dtype=float32"], STEPS)
    assert all(there for _, _, there in results)
    assert_trains_alike(ours, theirs)
    assert results[0][1] == BUDGET[mesh]
