"""Run moetrain as a command, and read what a run has written."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from tests.support import warm_start

ROOT = Path(__file__).parents[2]
DEBUG = ["experiment=debug", "run.steps=8", "run.device=cpu", "model.dim=32", "train.seq_len=16"]
EP2 = ["parallel=ep", "run.nproc=2"]


def moetrain(*words: str, cwd: Path, code: int = 0, launcher: tuple[str, ...] = (), **settings: str) -> str:
    """Run `moetrain <words>` to its end, which has to have this code. Returns what it printed."""
    command = [sys.executable, *(launcher or ("-m", "moetrain")), *words]
    done = warm_start.run(command, cwd=cwd, text=True, timeout=180, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env={**environment(), **settings})
    assert done.returncode == code, f"{words} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


def environment(root: Path = ROOT) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items()
             if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**clean, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}


def metrics(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def numbers(directory: Path) -> list[tuple]:
    """Numbers that must be the same bits in a resumed run; times are not."""
    return [tuple((key, float(value).hex()) for key, value in record.items()
                  if not key.startswith(("time", "throughput/", "memory/"))) for record in metrics(directory)]


def weights(directory: Path) -> dict[str, int]:
    """Checksum of every tensor of the newest checkpoint, optimizer state included."""
    newest = max((directory / "checkpoints").glob("step-*"))
    body = json.loads((newest / "manifest.json").read_text().split("\n", 1)[1])
    return {name: entry[-1] for name, entry in body["tensors"].items()}


def files(directory: Path) -> dict[str, str]:
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(directory.rglob("*")) if path.is_file()}
