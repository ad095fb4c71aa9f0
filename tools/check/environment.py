"""Report the GPU, libraries and compilers of a machine, as a table and as JSON for the stages of a check.

    python -m tools.check.environment --out environment.json

Exit code 0: torch computes on a GPU. 4: there is none that torch can use, and one line says why. 1: a package
that moetrain requires is missing.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NO_GPU = 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write what was found to this JSON file")
    options = parser.parse_args()
    if lacking := missing_packages():
        print(f"Python packages are missing: {', '.join(lacking)}\n"
              f"  try: {sys.executable} -m pip install -e {ROOT}")
        return 1
    from moetrain.comm.device import cuda_obstacle

    if obstacle := cuda_obstacle():
        print(f"no GPU: {obstacle.why}; {obstacle.advice}")
        return NO_GPU
    found = {**of_torch(), **of_programs()}
    for name, value in found.items():
        print(f"{name:18} {'not found' if value in (None, '') else value}")
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{found['gpu']}, driver {found['driver'] or 'unknown'}; "
          f"torch {found['torch']}, NCCL {found['nccl'] or 'none'}; "
          f"nvcc {found['nvcc'] or 'none'}; kernels: {found['kernels']}")
    return 0


def missing_packages() -> list[str]:
    """Requirements of moetrain in pyproject.toml that are not installed, and pytest where it is missing."""
    required = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    if sys.version_info >= (3, 14):                      # the only marker in the list ends before 3.14
        required = [line for line in required if "python_version" not in line]
    names = [re.match(r"[\w.-]+", line)[0] for line in [*required, "pytest"]]
    return [name for name in names if not installed(name)]


def installed(name: str) -> str:
    """Version of an installed package, or an empty string."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def of_torch() -> dict[str, str | int | float | None]:
    """The GPU and its libraries as torch sees them."""
    import torch

    from moetrain.machine import gpu_driver

    free, total = torch.cuda.mem_get_info(0)
    major, minor = torch.cuda.get_device_capability(0)
    nccl = torch.cuda.nccl.version() if torch.version.cuda else None
    return {
        "gpu": torch.cuda.get_device_name(0), "gpus": torch.cuda.device_count(),
        "arch": f"{major}{minor}{'a' * (major >= 9)}",
        "memory_gib": round(total / 2**30, 1), "free_gib": round(free / 2**30, 1),
        "multiprocessors": getattr(torch.cuda.get_device_properties(0), "multi_processor_count", None),
        "clock": smi("clocks.max.sm"), "driver": gpu_driver() or smi("driver_version"),
        "torch": torch.__version__, "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, nccl)) if nccl else None,
        "bfloat16": torch.cuda.is_bf16_supported(including_emulation=False),
    }


def of_programs() -> dict[str, str | int | None]:
    """Compilers and packages that some stages need, and the machine around the GPU."""
    os.environ["MOETRAIN_KERNELS"] = "1"
    from moetrain.ops import extension
    from tools.build_cuda import nvcc_path, release

    nvcc = nvcc_path()
    return {
        "nvcc": release(nvcc) if nvcc else None, "g++": shutil.which("g++"),
        "compute-sanitizer": shutil.which("compute-sanitizer"), "transformers": installed("transformers"),
        "kernels": extension.absent() or "usable", "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)), "system": platform.platform(),
    }


def smi(field: str) -> str | None:
    """One field of nvidia-smi for the first GPU, or None where nvidia-smi does not answer."""
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else None


if __name__ == "__main__":
    sys.exit(main())
