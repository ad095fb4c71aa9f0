"""Detection of processes that another launcher started, and refusal where they do not know of each other.

torchrun and the launchers of this package set RANK. srun and mpirun alone do not: each of their processes
would train by itself, all in one directory.
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

# Launchers set these for each rank.
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


class ForeignLaunch(NamedTuple):
    """Several processes of one command that another launcher started."""

    by: str         # name of the launcher
    variable: str   # environment variable that gives the number of processes
    processes: int
    nodes: int      # machines that they run on


def check_ranks(verb: str, overrides: Sequence[str], config: Config,
                environ: Mapping[str, str] = os.environ) -> None:
    """Refuse to be one of several processes that do not know of each other.

    Where the launcher of the ranks contradicts run.nproc, say that its number counts.

    Args:
        verb: command of `moetrain`.
        overrides: the command's arguments, for the advice in the error.
        config: what they compose to.
        environ: environment variables of this process.
    """
    if "RANK" in environ:
        world = environ.get("WORLD_SIZE", "")
        if under_torchrun() and rank() == 0 and config.run.nproc > 1 and world != str(config.run.nproc):
            print(f"moetrain: run.nproc={config.run.nproc} is ignored: RANK is set, "
                  f"so others have started the ranks (WORLD_SIZE={world})", file=sys.stderr)
        return
    found = several_processes(environ)
    # A batch script runs outside the steps of its job: its one process starts
    # as many ranks as run.nproc says.
    if found is None or found.by == "Slurm" and "SLURM_STEP_ID" not in environ and config.run.nproc > 1:
        return
    words = [word for word in overrides if not word.startswith("run.nproc=")]
    each = -(-found.processes // found.nodes)
    local = shlex.join(["moetrain", verb, *words, f"run.nproc={each}"])
    if found.by == "Slurm" and verb == "train":
        advice = shlex.join(["moetrain", "slurm", "--nodes", str(found.nodes), "--nproc-per-node", str(each),
                             *words])
    else:
        advice = local if found.by != "Slurm" else f"srun --nodes=1 --ntasks=1 {local}"
    raise ConfigError(
        123, f"{found.by} started {found.processes} processes of this command, and none knows of the others",
        where=f"{found.variable}={found.processes} in the environment",
        why="ranks are started by moetrain or torchrun, which set RANK; "
            "without it each of them would do all of the work",
        next=advice)


def several_processes(environ: Mapping[str, str]) -> ForeignLaunch | None:
    """The launcher, other than torchrun and moetrain, that started this process as one of several; else None.

    A step of a Slurm job has its own number of tasks, which may differ from the job's. The shell of `salloc`
    knows the job's number but has no SLURM_PROCID: it is one process.
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
    """Hide the variables of a rank from a verb that runs in one process.

    Job controllers set RANK in every pod, for the training command and not for this one.
    """
    before = {name: os.environ.pop(name) for name in _RANK_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    return int(text) if text.isdecimal() else 0
