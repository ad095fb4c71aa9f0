"""CUDA devices in host memory: real arithmetic and real gloo, refusals of a GPU, and a record of host waits.

    install(devices=2)      before anything asks for CUDA; changes the process for good, so in one of its own
    RECORD                  what made the host wait: phase, direction, kind, operator and place in moetrain

After it `torch.device("cuda", 0)` works on a CPU build of torch: plain tensors with storages, strides and
data pointers. What no composite kernel resolves arrives at one fallback for the dispatch key CUDA: it checks
devices, runs the CPU's kernel on aliases of the memory and wraps what comes. Memory that nobody wrote is NaN.
Groups made with `nccl` refuse tensors of the CPU; gloo groups of the same ranks beside them move the bytes.
No module of moetrain is patched.

More lenient than a GPU: work is done when it is posted, so a missing wait between streams, or a missing
record_stream, does not show; NCCL's rule of one order over communicators is not looked at, and that of one
rank a GPU only where a group is told its device; what a rank writes into symmetric memory its peers see at
once; the random numbers are the CPU's; the kernels are the CPU's, with its dtypes and its choice of
attention. Not there: NVSHMEM, copies by deepcopy or pickle.
"""

import warnings

import torch

from tests.support.simulated_device.collectives import register_collectives
from tests.support.simulated_device.cuda import patch_cuda
from tests.support.simulated_device.guard import library, unavailable
from tests.support.simulated_device.operators import register_operators
from tests.support.simulated_device.symmetric_memory import patch_symmetric_memory
from tests.support.simulated_device.waits import RECORD, Record, Wait, synchronized

__all__ = ["RECORD", "Record", "Wait", "install", "unavailable"]


def install(devices: int = 1) -> None:
    """Give this process CUDA devices. Call it before anything asks for CUDA; it cannot be undone."""
    assert not unavailable(), unavailable()
    if _INSTALLED:
        return
    library().simulated_install(devices, synchronized)
    patch_cuda(devices)
    patch_symmetric_memory()
    with warnings.catch_warnings():
        # Of kernels that are overridden.
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        _INSTALLED.extend([*register_operators(), register_collectives()])


_INSTALLED: list[torch.library.Library] = []
