"""Memory of this machine and its GPUs, and the limits of control groups. Imports no torch."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

CGROUP = Path("/sys/fs/cgroup")
# Files of a control group: its limit, what it uses, and what of that the system takes back when asked.
CGROUP_FILES = (("memory.max", "memory.current", "inactive_file"),
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))


class JobLimit(NamedTuple):
    """A limit that holds for this process, and the bytes below it that are left."""

    limit: int
    left: int


def total_memory() -> int:
    """Bytes of memory that programs of this job may have in all: the machine's, or what a limit leaves."""
    return min([_physical(), *(found.limit for found in job_limits())])


def machine_memory(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes that programs may still take of this machine; all that it has where the system does not tell."""
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return _physical()


def job_memory(membership: Path = Path("/proc/self/cgroup"), mounted: Path = CGROUP) -> list[int]:
    """Bytes left under each limit that a container or batch system set on this process's control groups."""
    return [found.left for found in job_limits(membership, mounted)]


def job_limits(membership: Path = Path("/proc/self/cgroup"), mounted: Path = CGROUP) -> Iterator[JobLimit]:
    """Limits of memory on this process's control groups, and on those above them."""
    for line in membership.read_text().splitlines() if membership.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        # Nothing above what is mounted.
        group = mounted / controllers / os.path.normpath(path).lstrip("/")
        for level in (group, *group.parents):            # a limit further up holds too
            if level.is_relative_to(mounted):
                yield from filter(None, (_limit(level, *names) for names in CGROUP_FILES))


def gpu_memory() -> int | None:
    """Bytes of the smallest GPU of this machine; None without one, or where nvidia-smi does not answer."""
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return min((int(mebibytes) << 20 for mebibytes in listed if mebibytes.isdigit()), default=None)


def has_gpu(device: Path = Path("/dev/nvidia0")) -> bool:
    """Whether this machine shows its programs an NVIDIA GPU, whatever torch can do with it.

    Under WSL there is no device file, so the driver's tool is asked.
    """
    return device.exists() or gpu_memory() is not None


def gpu_driver(told: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Version of the NVIDIA driver; None where the kernel does not tell."""
    found = re.search(r"Module .*?(\d+\.\d[\d.]*)", told.read_text()) if told.exists() else None
    return found[1] if found else None


def _physical() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _limit(group: Path, limit: str, usage: str, reclaimable: str) -> JobLimit | None:
    """Limit of a control group; None where there is none."""
    try:
        allowed, used = (group / limit).read_text().strip(), int((group / usage).read_text())
        lines = (group / "memory.stat").read_text().splitlines()
    except OSError:
        return None
    cached = next((int(line.split()[1]) for line in lines if line.split()[0] == reclaimable), 0)
    return None if allowed == "max" else JobLimit(int(allowed), max(1, int(allowed) - used + cached))
