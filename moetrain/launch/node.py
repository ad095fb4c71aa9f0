"""Place of this machine among the nodes of a run, from environment variables.

NODES, NODE_RANK, HEAD, PORT, NPROC, RESTARTS and RDZV_TIMEOUT are environment variables, so that the command
line holds the overrides of the run alone and is the same on all nodes.
"""

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from moetrain.config.compose import compose
from moetrain.config.schema import Config
from moetrain.errors import ConfigError, ConfigErrors

PORT = 29400
_DRIVER_S = 30             # time limit of nvidia-smi


@dataclass(frozen=True)
class Node:
    """The place of this machine among those of the run."""

    nodes: int         # number of machines
    rank: int          # number of this one, 0 to nodes - 1; node 0 is the head
    head: str          # name or address at which the others reach node 0
    port: int          # port of the head; unused with one node
    nproc: int         # ranks on each node
    restarts: int      # how often all ranks are started again after a failure
    timeout_s: int     # seconds that the nodes wait for each other

    @property
    def ranks(self) -> int:
        """Number of ranks of the run."""
        return self.nodes * self.nproc


def from_environment(environ: Mapping[str, str]) -> Node:
    """Read and check the environment variables; raises ConfigErrors with everything that is wrong."""
    errors: list[ConfigError] = []

    def number(name: str, default: int | Callable[[], int], least: int) -> int:
        text = environ.get(name, "")
        if text.isdigit() and int(text) >= least:
            return int(text)
        if text:
            errors.append(_wrong(f"{name}={text}", name, f"it is a whole number from {least}",
                                 f"{name}={max(least, 1) if callable(default) else default}"))
            return least
        return default() if callable(default) else default

    nodes = number("NODES", 1, 1)
    in_step = environ.get("SLURM_NODEID", "")  # Slurm sets it for each task of a step
    rank = number("NODE_RANK", int(in_step) if nodes > 1 and in_step.isdigit() else 0, 0)
    node = Node(nodes, rank, environ.get("HEAD", ""), number("PORT", PORT, 1),
                number("NPROC", lambda: _devices(environ), 1), number("RESTARTS", 3, 0),
                number("RDZV_TIMEOUT", 60, 1))
    if nodes > 1 and "NODE_RANK" not in environ and not in_step:
        errors.append(_wrong(f"NODES={nodes} without NODE_RANK", "NODE_RANK",
                             "each node needs a number of its own",
                             f"NODE_RANK=0 on the first node, up to NODE_RANK={nodes - 1}"))
    if rank >= nodes and not errors:
        errors.append(_wrong(f"NODE_RANK={rank} with NODES={nodes}", "NODE_RANK",
                             f"the nodes are numbered 0 to {nodes - 1}",
                             f"NODE_RANK={nodes - 1} or NODES={rank + 1}"))
    if nodes > 1 and not node.head:
        errors.append(_wrong(f"NODES={nodes} without HEAD", "HEAD", "the nodes meet at node 0",
                             "HEAD=<name or address of node 0>, the same on every node"))
    if node.port > 65535:
        errors.append(_wrong(f"PORT={node.port}", "PORT", "the largest port is 65535", f"PORT={PORT}"))
    if errors:
        raise ConfigErrors(errors)
    return node


def config_for(overrides: Sequence[str], ranks: int) -> Config:
    """Compose the config, checked for as many ranks as torchrun will start.

    RANK and WORLD_SIZE are set meanwhile, as they will be for the ranks.
    """
    before = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE")}
    os.environ |= {"RANK": "0", "WORLD_SIZE": str(ranks)}
    try:
        return compose(overrides)
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _wrong(what: str, where: str, why: str, next: str) -> ConfigError:
    return ConfigError(46, what, where=f"{where} in the environment", why=why, next=next)


def _devices(environ: Mapping[str, str]) -> int:
    """Number of GPUs of this machine that the run may use; 1 without any."""
    visible, of_slurm = environ.get("CUDA_VISIBLE_DEVICES"), environ.get("SLURM_GPUS_ON_NODE", "")
    if of_slurm.isdigit():
        return max(1, int(of_slurm))
    if visible is not None:
        return max(1, len([device for device in visible.split(",") if device.strip()]))
    if not shutil.which("nvidia-smi"):
        return 1
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True,
                                timeout=_DRIVER_S).stdout
    except subprocess.TimeoutExpired:  # the driver hangs: the ranks will fail and report it
        return 1
    return max(1, listed.count("UUID"))
