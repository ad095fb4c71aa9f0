"""Device of a rank: a GPU of its own or the CPU, and the reason why torch cannot use a GPU that exists.

torch.cuda.is_available() answers yes or no only. The reason is in the error of torch.cuda.init(), whose texts
(c10/cuda/CUDAFunctions.cpp of torch 2.13) are read here, so that a user learns what to install or to unset.
"""

import os
import re
import warnings
from typing import NamedTuple

import torch

from moetrain.config.schema import Config
from moetrain.errors import ConfigError
from moetrain.machine import gpu_driver, has_gpu

LOOK = "nvidia-smi shows what the driver sees"


class Obstacle(NamedTuple):
    """Reason why torch can use no GPU on this machine, and advice what to do about it."""

    why: str
    advice: str


def pick_device(config: Config) -> torch.device:
    """Return the device that the config gives this rank; raise ConfigError where there is none."""
    obstacle = None if config.run.device == "cpu" else cuda_obstacle()
    if obstacle and config.run.device == "cuda":
        raise ConfigError(90, "run.device=cuda, and torch can use no GPU", where="run.device",
                          why=obstacle.why, next=f"{obstacle.advice}; or run.device=cpu")
    if obstacle or config.run.device == "cpu":
        return torch.device("cpu")
    rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if rank >= gpus and not config.run.share_gpu:
        raise ConfigError(
            92, f"no GPU for rank {rank} of this machine", where="run.nproc, run.share_gpu",
            why=f"every rank has a GPU of its own, and torch sees {gpus}",
            next=f"run.nproc={gpus} (torchrun: --nproc-per-node={gpus}), run.device=cpu, "
                 "or run.share_gpu=true to check a setup, slowly",
        )
    return torch.device("cuda", rank % gpus)


def take_device(device: torch.device) -> None:
    """Make a GPU the current one and compute on it once; raise ConfigError where it refuses.

    A GPU that is busy refuses. torch makes the CUDA context at the first allocation. Without this call, a GPU
    that is full, in exclusive use or too old for this torch would end in a traceback from the middle of the
    set-up.
    """
    if device.type != "cuda":
        return
    try:
        torch.cuda.set_device(device)
        torch.ones(1, device=device).add_(1)
        torch.cuda.synchronize(device)
    except RuntimeError as error:        # torch.AcceleratorError and torch.OutOfMemoryError are subclasses
        why = str(error).splitlines()[0]
        built = "no kernel image" in why
        known = f"; this torch was built for {' '.join(torch.cuda.get_arch_list())}" if built else ""
        raise ConfigError(
            110, f"GPU {device.index} cannot be used", where="run.device", why=why + known,
            next="a torch that was built for this GPU, or run.device=cpu" if built else
                 "nvidia-smi names the processes on it; CUDA_VISIBLE_DEVICES=<number of another> before the "
                 "same command, or run.device=cpu",
        ) from error


def cuda_obstacle() -> Obstacle | None:
    """Find what keeps torch from every GPU of this machine; None if it sees one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                  # torch warns of an old driver; explained below
        if torch.cuda.is_available():
            return None
    if torch.version.cuda is None and torch.version.hip is None:
        release = torch.__version__.partition("+")[0]    # without "+cpu"
        with_cuda = f"pip install --force-reinstall torch=={release} brings one with CUDA on Linux"
        return Obstacle(f"torch {torch.__version__} is a CPU build",
                        with_cuda if has_gpu() else "a machine with an NVIDIA GPU")
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return explained(str(error), os.environ.get("CUDA_VISIBLE_DEVICES"))
    return Obstacle(f"torch {torch.__version__} reports that CUDA is not available", LOOK)


def explained(said: str, visible: str | None) -> Obstacle:
    """Explain an error of torch.cuda.init() by its text and the value of CUDA_VISIBLE_DEVICES."""
    if found := re.search(r"driver on your system is too old \(found version (\d+)\)", said):
        serves, driver = f"{int(found[1]) // 1000}.{int(found[1]) % 1000 // 10}", gpu_driver()
        named = f"the NVIDIA driver {driver}" if driver else "the NVIDIA driver"
        return Obstacle(f"{named} serves CUDA {serves}, and torch {torch.__version__} was built for CUDA "
                        f"{torch.version.cuda}",
                        f"a driver for CUDA {torch.version.cuda}, or a torch built for CUDA {serves} "
                        f"(pytorch.org/get-started/locally)")
    if "no NVIDIA driver" in said:
        return Obstacle("torch finds no NVIDIA driver",
                        "install one; a container needs to be started with --gpus all")
    if visible is not None and "No CUDA GPUs" in said:
        return Obstacle(f"CUDA_VISIBLE_DEVICES={visible!r} leaves no GPU", "unset CUDA_VISIBLE_DEVICES")
    return Obstacle(said.strip().splitlines()[0], LOOK)


def unused_gpu(config: Config) -> str:
    """Describe in one line a GPU that run.device=auto left unused.

    Empty where there is no GPU, or where CUDA_VISIBLE_DEVICES hides it on purpose.
    """
    if config.run.device != "auto" or "CUDA_VISIBLE_DEVICES" in os.environ:
        return ""
    obstacle = cuda_obstacle()
    return f"cpu, beside a GPU: {obstacle.why}; {obstacle.advice}" if obstacle and has_gpu() else ""
