"""Runs of a study, one after the other.

Each is `moetrain train` in a directory of its own, and resumes there: a study that was stopped goes on with
the same command. What has finished is kept in a file of the repository,
too, so that it goes on on another machine.
"""

import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]


class Planned(NamedTuple):
    """A run that has not finished.

    Args:
        name: name of its directory.
        command: the command that trains it.
        read: reads its figures from the directory, as a record.
        shown: one line of them.
    """

    name: str
    command: list[str]
    read: Callable[[Path], Any]
    shown: Callable[[Any], str]


def commit() -> str:
    """Short commit of the code."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip()


def train_all(left: Sequence[Planned], out: Path, minutes: float) -> None:
    """Train runs, and write `result.json` beside each.

    Args:
        left: the runs, in order.
        out: folder of their directories.
        minutes: no run is started after so many.
    """
    began = time.monotonic()
    for done, run in enumerate(left, 1):
        start = time.monotonic()
        if start - began > 60 * minutes:
            return
        directory = out / run.name
        directory.mkdir(parents=True, exist_ok=True)
        with open(directory / "study.log", "a") as log:
            code = subprocess.run(run.command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT,
                                  env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
        if code:
            raise SystemExit(f"{run.name} ended with {code}; see {directory / 'study.log'}")
        result = run.read(directory)
        (directory / "result.json").write_text(json.dumps(result._asdict()))
        rest, each = len(left) - done, (time.monotonic() - began) / done
        print(f"{run.name}: {run.shown(result)}, {time.monotonic() - start:.0f} s; "
              f"{rest} to go, about {each * rest / 60:.0f} min", flush=True)


def read_records(out: Path, record: Path) -> list[dict[str, Any]]:
    """Figures of the runs that have finished, those of the record first.

    Args:
        out: folder of the runs on this machine.
        record: file of the repository with a line for each run.
    """
    lines = record.read_text().splitlines() if record.exists() else []
    found = [json.loads(text) for text in [*lines, *(
        file.read_text() for file in sorted(out.glob("*/result.json")))]]
    if len({run["corpus"] for run in found}) > 1:
        raise SystemExit(f"runs on different corpora cannot be compared: move {record} away, "
                         "or install the versions that it was made with")
    return found
