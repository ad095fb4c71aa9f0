"""Training on the simulated CUDA device: the numbers of the CPU on every mesh, and a budget of host waits.

Two steps of the tiny model in float64's stead: float32, whose sums are the CPU's here, and bfloat16, in which counts stay on
the device. BUDGET says where the host waits in the third step; a wait that is added, or gone, fails the test.
"""

from collections import Counter

import pytest
import torch

from tests.integration.training import Trained, alone, difference, make_run, snapshot, train_steps, union
from tests.ranks import Ranks
from tests.support import simulated_device

pytestmark = [pytest.mark.ranks, pytest.mark.skipif(bool(simulated_device.unavailable()), reason=simulated_device.unavailable() or "-")]

ON_DEVICE = ["run.device=cuda"]
MESHES = {
    "ddp": ["parallel=ddp"], "ep": ["parallel=ep"], "fsdp": ["parallel=fsdp"], "ep_fsdp": ["parallel=ep_fsdp"],
    "fssdp": ["parallel=fssdp", "model.num_experts=4"],
}


@pytest.fixture(scope="module")
def devices():
    """devices(n): n processes with a simulated device each."""
    pools: dict[int, Ranks] = {}

    def get(size: int) -> Ranks:
        return pools.setdefault(size, Ranks(size, simulated=True))

    yield get
    for pool in pools.values():
        pool.close()


def on_host(trained: Trained) -> Trained:
    return trained


def waits_of_third_step(overrides: list[str]) -> dict[str, int]:
    """How often the host waits in step 3, by direction, kind and place."""
    run = make_run([*overrides, *ON_DEVICE])
    from moetrain.train.step import train_step

    for step in (1, 2, 3):
        simulated_device.RECORD.clear()
        train_step(run, step)
    found: Counter[str] = Counter()
    for wait, times in simulated_device.RECORD.items():
        found[f"{'backward ' * wait.backward}{wait.place}: {wait.kind}"] += times
    return dict(sorted(found.items()))
