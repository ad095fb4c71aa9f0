"""Ranks that others were to start: what the environment says of it, and what contradicts it.

torchrun and our own launchers set RANK. srun and mpirun alone do not: every process of theirs would train by itself, in one
directory.
"""

import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from moetrain.config.schema import Config
from moetrain.errors import ConfigError
from moetrain.launch.rank import rank, under_torchrun

# Set by whoever starts ranks, for each of them.
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


class ForeignLaunch(NamedTuple):
    """Several processes of one command. nodes: machines they are on."""

    by: str
    variable: str
    processes: int
    nodes: int


def check_ranks(verb: str, overrides: Sequence[str], config: Config, environ: Mapping[str, str] = os.environ) -> None:
    """Refuse to be one of several processes that do not know of each other; say which number of ranks counts."""
    if "RANK" in environ:
        world = environ.get("WORLD_SIZE", "")
        if under_torchrun() and rank() == 0 and config.run.nproc > 1 and world != str(config.run.nproc):
            print(f"moetrain: run.nproc={config.run.nproc} is ignored: RANK is set, so others have started the ranks (WORLD_SIZE={world})",
                  file=sys.stderr)
        return
    found = several_processes(environ)
    # A batch script is no step of its job: the one process there starts the ranks that it is asked for.
    if found is None or found.by == "Slurm" and "SLURM_STEP_ID" not in environ and config.run.nproc > 1:
        return
    words = [word for word in overrides if not word.startswith("run.nproc=")]
    each = -(-found.processes // found.nodes)
    local = shlex.join(["moetrain", verb, *words, f"run.nproc={each}"])
    if found.by == "Slurm" and verb == "train":
        advice = shlex.join(["moetrain", "slurm", "--nodes", str(found.nodes), "--nproc-per-node", str(each), *words])
    else:
        advice = local if found.by != "Slurm" else f"srun --nodes=1 --ntasks=1 {local}"
    raise ConfigError(123, f"{found.by} started {found.processes} processes of this command, and none knows of the others",
                      where=f"{found.variable}={found.processes} in the environment",
                      why="ranks are started by moetrain or torchrun, which set RANK; without it each of them would do all of the work",
                      next=advice)


def several_processes(environ: Mapping[str, str]) -> ForeignLaunch | None:
    """Who started this process as one of several, where that is not torchrun or moetrain.

    A step of Slurm says how many tasks it has; a job does too, and its shell (salloc) has no number of its own.
    """
    in_step = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    nodes = _number(environ, "SLURM_STEP_NUM_NODES") or _number(environ, "SLURM_JOB_NUM_NODES") or 1
    if "SLURM_PROCID" in environ and _number(environ, in_step) > 1:
        return ForeignLaunch("Slurm", in_step, _number(environ, in_step), nodes)
    for variable in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if _number(environ, variable) > 1:
            return ForeignLaunch("mpirun", variable, _number(environ, variable), 1)
    return None


@contextmanager
def without_ranks() -> Iterator[None]:
    """For verbs of one process: whoever set RANK, as job controllers do for every pod, meant another command."""
    before = {name: os.environ.pop(name) for name in _RANK_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    return int(text) if text.isdecimal() else 0
