"""Run moetrain as a command and capture its two streams apart."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def moetrain(*argv: str, cwd: Path, python: tuple[str, ...] = (), **env: str) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items()
             if name not in ("RANK", "WORLD_SIZE", "MOETRAIN_DEBUG")}
    return subprocess.run([sys.executable, *python, "-m", "moetrain", *argv], cwd=cwd, capture_output=True,
                          text=True, timeout=60, env={**clean, "PYTHONPATH": str(ROOT), **env})
