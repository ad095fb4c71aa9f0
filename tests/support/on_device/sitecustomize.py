"""Simulated CUDA devices in every Python process that finds this folder on PYTHONPATH and imports torch.

    PYTHONPATH=tests/support/on_device:. SIMULATED_DEVICES=2 python -m moetrain train run.device=cuda

Python imports a module of this name when it starts. A process that imports no torch stays without.
"""

import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType


class _TorchWithDevices:
    """An import finder that loads torch as it is found otherwise, and then installs the devices."""

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            from tests.support import simulated_device

            simulated_device.install(int(os.environ.get("SIMULATED_DEVICES", "1")))

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _TorchWithDevices())
