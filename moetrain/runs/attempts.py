"""Attempts at a run: rank 0 holds the run's lock and records every start and end.

    lock                  <run.dir>/lock refuses a second job (runs/lock.py)
    log/attempts.jsonl    one line for each start and each end; a run that crashes repeatedly at one step is
                          refused with exit code 17
"""

import json
import os
import socket
import time
from pathlib import Path
from types import TracebackType

from moetrain.errors import CrashLoopError
from moetrain.runs.lock import RunLock

CRASHES = 3
# Exit codes that are no crash: done, preempted, a user's mistake, told to stop.
ORDERLY = {0, 2, 10, 11, 12, 13, 14, 15, 18}


class RunAttempts:
    """Lock of a run's directory, held while entered, and the record of its attempts."""

    def __init__(self, directory: Path) -> None:
        self.lock = RunLock(directory)
        self.attempts = directory / "log" / "attempts.jsonl"
        self.status = directory / "status.json"

    def __enter__(self) -> "RunAttempts":
        self.lock.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.lock.__exit__(kind, error, trace)

    def begin(self, step: int) -> None:
        """Record that an attempt starts from this step.

        Raises CrashLoopError after CRASHES attempts in a row that crashed without reaching the next save.
        """
        crashed = self._crashed(step)
        if crashed >= CRASHES:
            raise CrashLoopError(
                1,
                f"the run crashed {crashed} times in a row after step {step} without reaching the next save",
                where=str(self.attempts),
                why="the same would happen again; log/rank-<n>.log and status.json say what it was",
                next=f"mend the cause, then remove {self.attempts} and run the same command",
            )
        self.status.unlink(missing_ok=True)  # it tells how an earlier attempt ended
        self._note({"start": step, "pid": os.getpid(), "host": socket.gethostname(), "time": _now()})

    def end(self, code: int) -> None:
        """Record the exit code with which the attempt ends."""
        self._note({"end": code, "time": _now()})

    def _crashed(self, step: int) -> int:
        """Number of the newest attempts in a row that started from this step and did not end in order."""
        count, orderly = 0, False
        for line in reversed(_lines(self.attempts)):
            if "end" in line:
                orderly = line["end"] in ORDERLY or isinstance(line["end"], int) and line["end"] > 128
            elif line.get("start") != step or orderly:
                break
            else:
                count += 1
        return count

    def _note(self, record: dict) -> None:
        self.attempts.parent.mkdir(parents=True, exist_ok=True)
        with self.attempts.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def _lines(path: Path) -> list[dict]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue  # the line was cut off
    return [line for line in found if isinstance(line, dict)]


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")
