"""How the records of a run are written: appended line by line, cut back on resume, replaced whole. No torch, no numpy here.

A resumed run cuts its files to the restored step; what is cut goes to <file>.lost and is never deleted.
"""

import contextlib
import errno
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moetrain.errors import DiskError

FULL_S = 10.0            # that a record waits for space


def make_place(path: Path, rank: int, ranks: int) -> None:
    """The directory of a record of which every rank writes a file, rank-NNNN.*: made, and without those that an attempt with more ranks
    has left there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.iterdir() if rank == 0 else ():
        number = re.fullmatch(r"rank-(\d+)\..*", left.name)
        if number and int(number[1]) >= ranks and left.is_file():
            left.unlink(missing_ok=True)


class JsonlSink:
    """Appends objects with a key `step` to a file. A number that is not finite is written NaN or Infinity."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    def write(self, record: Mapping[str, Any]) -> None:
        """One write and one flush: a killed run leaves whole lines, but for the last."""
        append(self.path, json.dumps(record).encode() + b"\n")

    def cut_to(self, step: int) -> None:
        """Keep the lines up to this step. Call it before the first write of a run, with step 0 when there is none."""
        if not self.path.is_file():
            return
        with written(self.path):
            before = self.path.read_bytes()
            lines = [line + b"\n" for line in before.split(b"\n") if line]
            kept = [line for line in lines if _is_kept(line, step)]
            if (after := b"".join(kept)) == before:
                return
            append_lost(self.path, b"".join(line for line in lines if not _is_kept(line, step)))
            with replacing(self.path) as file:
                file.write(after)

    def has(self, step: int) -> bool:
        """Whether a whole line of this step is there."""
        if not self.path.is_file():
            return False
        return any(_is_kept(line, step) and not _is_kept(line, step - 1) for line in self.path.read_bytes().split(b"\n"))


def _is_kept(line: bytes, step: int) -> bool:
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):                    # a line that was cut off
        return False


@contextlib.contextmanager
def written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DiskError(20, "a record of the run cannot be written", where=str(path), why=error.strerror or str(error),
                        next="free space there, or run.dir=<another directory>; the same command resumes") from error


def append(path: Path, data: bytes) -> None:
    """All of it in one go, or over a few seconds where the disk is full: a save that did not fit gives its space back."""
    rest, until = memoryview(data), time.monotonic() + FULL_S
    with written(path), path.open("ab", buffering=0) as file:
        while rest:
            try:
                rest = rest[file.write(rest):]
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT) or time.monotonic() > until:
                    raise
                time.sleep(0.1)


def append_lost(path: Path, data: bytes) -> None:
    with path.with_name(path.name + ".lost").open("ab") as file:
        file.write(data)
        _sync(file)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Any]:
    """A file to write that takes the place of `path` only when it is complete."""
    draft = path.with_name(path.name + ".tmp")
    with draft.open("wb") as file:
        yield file
        _sync(file)
    draft.replace(path)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
