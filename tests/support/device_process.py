"""Processes with simulated CUDA devices: one for many calls of a test, or any program by its environment.

    with DeviceProcess() as device:
        running = device.start(function, *arguments)       # by its name, in the other process
        ours = running.result()                            # numbers, and tensors of the CPU

    subprocess.run(command, env=environment(devices=2))

There is no process group: what is called is alone, as with parallel=single.
"""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).parents[2]
T = TypeVar("T")


class DeviceProcess:
    """A context manager; the process starts with the first call and ends with the block."""

    def __init__(self, devices: int = 1) -> None:
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _install, (devices,))

    def start(self, function: Callable[..., T], *arguments: object) -> Future[T]:
        return self._pool.submit(function, *arguments)

    def run(self, function: Callable[..., T], *arguments: object) -> T:
        return self.start(function, *arguments).result()

    def __enter__(self) -> "DeviceProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()


def _install(devices: int) -> None:
    from tests.support import simulated_device

    simulated_device.install(devices)


def environment(devices: int = 1) -> dict[str, str]:
    """Variables with which a Python program has devices once it imports torch, and no launcher around it."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    kept = {name: value for name, value in os.environ.items() if name not in launcher}
    path = os.pathsep.join(map(str, (ROOT / "tests" / "support" / "on_device", ROOT)))
    return kept | {"PYTHONPATH": path, "SIMULATED_DEVICES": str(devices), "OMP_NUM_THREADS": "1"}
