"""Hardware of the nodes of a Slurm partition, and the share of a node that a job requests.

Slurm gives a task one core unless it is told otherwise, which starves the ranks of a node with eight GPUs. A
job that takes a share of a node's GPUs requests the same share of its cores and memory; one without GPUs a
core for each rank.
"""

import re
import subprocess
from collections.abc import Sequence
from typing import NamedTuple

from moetrain.launch.slurm_options import GPUS, Job

DEFAULT_TIME = "24:00:00"


class NodeShape(NamedTuple):
    """Resources of one kind of node."""

    cpus: int
    memory_mb: int
    gpus: int
    time_limit: str  # of the partition, in Slurm's notation


def node_shapes(partition: str | None) -> list[NodeShape]:
    """List the kinds of node in a partition; empty where Slurm does not answer.

    Without a name it is the default partition.
    """
    command = ["sinfo", "--noheader", "--exact", "--format=%P|%c|%m|%G|%l"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [line.strip().split("|") for line in listed.splitlines() if line.count("|") == 4]
    return [NodeShape(int(cpus), int(memory), GPUS["--gres"](re.sub(r"\([^)]*\)", "", gres), 1) or 0, limit)
            for name, cpus, memory, gres, limit in rows
            if (name.rstrip("*") in partition.split(",") if partition else name.endswith("*"))
            and cpus.isdigit() and memory.isdigit()]


def resource_options(job: Job, shapes: Sequence[NodeShape]) -> list[str]:
    """Options of sbatch for cores, memory and the time limit, as far as the command line has none."""
    fitting = [shape for shape in shapes
               if shape.gpus >= job.gpus and shape.cpus >= (0 if job.gpus else job.nproc)]
    options = []
    if fitting and not job.sets_cpus:
        options.append(f"--cpus-per-task={min(_share(job, shape, shape.cpus) for shape in fitting)}")
    if fitting and not job.sets_memory:
        whole = all(_share(job, shape, shape.cpus) == shape.cpus for shape in fitting)
        options.append("--mem=0" if whole else
                       f"--mem={min(_share(job, shape, shape.memory_mb) for shape in fitting)}M")
    if "--time" not in job.values:
        limits = [shape.time_limit for shape in fitting
                  if 0 < minutes(shape.time_limit) < minutes(DEFAULT_TIME)]
        options.append(f"--time={min(limits, key=minutes, default=DEFAULT_TIME)}")
    return options


def minutes(limit: str) -> float:
    """Convert a time limit of Slurm (`1-12:00:00`, `12:00:00`, `30:00`) to minutes; 0 for `infinite`."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", limit)
    if found is None:
        return 0
    days, hours, mins, seconds = (int(number or 0) for number in found.groups())
    return ((days * 24 + hours) * 60 + mins) + seconds / 60


def _share(job: Job, shape: NodeShape, of: int) -> int:
    """The job's share of an amount that a node has."""
    return max(1, of * job.gpus // shape.gpus if job.gpus else of * job.nproc // shape.cpus)
