"""Device guard and hooks of guard.cpp, built with g++ once for each torch."""

import ctypes
import hashlib
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import torch

ROOT = Path(__file__).parents[3]
SOURCE = Path(__file__).with_suffix(".cpp")


@cache
def library() -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(built()))
    loaded.simulated_stream.restype = ctypes.c_int64
    return loaded


def unavailable() -> str:
    """Why there is no simulated device on this machine; empty where there is one."""
    if torch.version.cuda is not None:
        return "torch has CUDA: the real device is tested"
    return "" if shutil.which("g++") else "no g++ to build the device's guard"


def built() -> Path:
    """The library of guard.cpp, built once for its source and this torch."""
    folder = Path(torch.__file__).parent
    digest = hashlib.sha256(torch.__version__.encode() + SOURCE.read_bytes()).hexdigest()[:16]
    target = ROOT / "build" / "simulated_device" / f"{digest}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_suffix(f".{os.getpid()}")       # two processes may build at once
        torch_paths = ["-isystem", str(folder / "include"), str(SOURCE), "-L", str(folder / "lib")]
        subprocess.run(["g++", "-std=c++20", "-O1", "-g0", "-fPIC", "-shared", *torch_paths,
                        "-ltorch_cpu", "-lc10", "-o", str(unfinished)], check=True)
        unfinished.rename(target)
    return target
