"""Record of how a run ended: <run.dir>/status.json, written by rank 0, and the log files of the other ranks.

This file imports no torch.
"""

import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from moetrain.errors import DiskError, MoETrainError, exit_code
from moetrain.files import create, open_regular, open_to_append, parse_json, reason
from moetrain.launch.rank import has_own_stderr, rank, under_torchrun
from moetrain.runs.lock import RunLock

log = logging.getLogger(__name__)


@contextmanager
def record_ending(run_dir: Path) -> Iterator[None]:
    """Write status.json on rank 0 when the block ends. Does nothing where the run has no directory."""
    try:
        yield
    except MoETrainError as error:
        write_status(run_dir, error.code, str(error).splitlines()[0])
        if rank() and under_torchrun():  # ranks share the terminal, so only rank 0 prints on it
            _append_to_log(run_dir, str(error))
        raise
    except (SystemExit, KeyboardInterrupt) as leaving:
        code = exit_code(leaving)
        if code > 128:
            record_early_exit(
                run_dir, code, f"{signal.Signals(code - 128).name} before there was anything new to save")
        else:
            write_status(run_dir, code, "another rank failed; log/rank-<n>.log says why")
        raise
    except Exception as error:
        write_status(run_dir, 1, f"{type(error).__name__}: {error}")
        raise
    write_status(run_dir, 0, "done")


def record_early_exit(run_dir: Path, code: int, reason: str) -> None:
    """Print and record why the process leaves without a save.

    Args:
        run_dir: directory of the run.
        code: exit code of the process.
        reason: one line for the terminal and status.json.
    """
    if has_own_stderr():
        print(f"moetrain: {reason}; the same command goes on from the newest save",
              file=sys.stderr, flush=True)
    write_status(run_dir, code, reason)


def write_status(run_dir: Path, code: int, reason: str) -> None:
    """Write status.json on rank 0, unless another job holds the run's lock.

    Never raises: the error that is being reported matters more.

    Args:
        run_dir: directory of the run.
        code: exit code of the run.
        reason: one line that says why.
    """
    if rank() or not run_dir.is_dir() or RunLock(run_dir).holder():
        return
    draft = run_dir / "status.json.tmp"
    try:
        status = {"code": code, "reason": reason, "step": last_step(run_dir)}
        with create(draft) as file:
            file.write(f"{json.dumps(status)}\n".encode())
        draft.replace(run_dir / "status.json")
    except OSError as error:
        log.warning("status.json could not be written: %s", error)


def _append_to_log(run_dir: Path, text: str) -> None:
    try:
        with open_log(run_dir, rank()) as file:
            file.write(f"{text}\n".encode())
    except DiskError as error:
        log.warning("%s", error)


def open_log(run_dir: Path, rank: int) -> IO[bytes]:
    """Open the log file of a rank, log/rank-N.log, to append to it."""
    path = run_dir / "log" / f"rank-{rank}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open_to_append(path)
    except OSError as error:
        raise DiskError(1, "the log of a rank cannot be written", where=str(path), why=reason(error),
                        next="run.dir=<a directory that can be written>") from error


def last_step(run_dir: Path) -> int:
    """Number of the last step that metrics.jsonl records; 0 before the first."""
    try:
        with open_regular(run_dir / "metrics.jsonl") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(parse_json(line)["step"])
        except (ValueError, KeyError, TypeError, OverflowError):
            continue  # the line was cut off or is damaged
    return 0
