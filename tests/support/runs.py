"""Start the scripts of launch/ as processes, and read the run that they leave."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.support import warm_start
from tests.support.ranks import free_port

ROOT = Path(__file__).parents[2]
# A rank for each node: the smallest run that shares something.
TINY = ["experiment=debug", "run.device=cpu", "model.dim=32", "train.seq_len=16", "parallel=ep"]


def environment(**settings: object) -> dict[str, str]:
    ours = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "NODES", "NODE_RANK", "HEAD", "PORT", "NPROC",
            "GLOO_SOCKET_IFNAME"}
    clean = {name: value for name, value in os.environ.items()
             if name not in ours and not name.startswith("SLURM")}
    typed = {name: str(value) for name, value in settings.items()}
    return {**clean, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **typed}


@contextlib.contextmanager
def started(script: str, *overrides: str, prefix: tuple[str, ...] | None = None,
            **settings: object) -> Iterator[subprocess.Popen]:
    """launch/<script> on one node, until the block ends; without a prefix, the program that it executes."""
    if prefix is None:
        command = [sys.executable, "-m", "moetrain.launch", *overrides]
        settings = settings if script == "nodes.sh" else {"NODES": 1, "NODE_RANK": 0, **settings}
    else:
        command = [*prefix, "bash", str(ROOT / "launch" / script), *overrides]
    process = warm_start.Popen(command, cwd=ROOT, env=environment(**settings), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
        process.kill()


@contextlib.contextmanager
def two_nodes(*overrides: str, head: str = "127.0.0.1", prefixes: tuple[tuple[str, ...], ...] = ((), ()),
              **settings: object) -> Iterator[list[subprocess.Popen]]:
    """launch/nodes.sh twice; the second node is started first."""
    shared = {"NODES": 2, "NPROC": 1, "HEAD": head, "PORT": free_port(), **settings}
    with (started("nodes.sh", *overrides, prefix=prefixes[1], NODE_RANK=1, **shared) as second,
          started("nodes.sh", *overrides, prefix=prefixes[0], NODE_RANK=0, **shared) as first):
        yield [first, second]


def ended(process: subprocess.Popen, limit_s: float = 240) -> tuple[int, str]:
    """Exit code and output of a process, once it has ended."""
    output, _ = process.communicate(timeout=limit_s)
    return process.returncode, output


def until(condition: Callable[[], bool], limit_s: float = 180) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that in time"
        time.sleep(0.1)


def steps(run: Path) -> list[int]:
    """Step numbers in metrics.jsonl, the last line perhaps still being written."""
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    found = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line)["step"])
    return found


def status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


def ranks(run: Path) -> list[int]:
    """Process ids of the ranks that train in this directory."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            words = (entry / "cmdline").read_bytes().decode().split("\0")
            if f"run.dir={run}" in words and words[words.index("-m") + 1:][:2] == ["moetrain", "train"]:
                found.append(int(entry.name))
    return found


def children(parent: int) -> list[int]:
    """Process ids of those it has started; a spare is none (tests/support/warm_process.py)."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            spare = (entry / "cmdline").read_bytes().startswith(b"spare\0")
            if int((entry / "stat").read_text().rpartition(") ")[2].split()[1]) == parent and not spare:
                found.append(int(entry.name))
    return found


def is_alive(process: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has waited for does not."""
    with contextlib.suppress(OSError):
        return (Path("/proc") / str(process) / "stat").read_text().rpartition(") ")[2][0] != "Z"
    return False
