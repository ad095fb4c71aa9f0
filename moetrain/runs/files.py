"""Writing of a run's record files: appended line by line, cut back on resume, or replaced atomically.

A resumed run cuts its files back to the restored step; what is cut goes to <file>.lost and is never deleted.
This file imports neither torch nor numpy.
"""

import contextlib
import errno
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from moetrain.errors import DiskError
from moetrain.files import create, open_regular, open_to_append, parse_json, reason, remedy

FULL_DISK_S = 10.0      # how long a record waits for space on a full disk
MAX_LINE = 16 << 20     # bytes of a line; a line of metrics has about two thousand


def prepare_rank_file(path: Path, rank: int, ranks: int) -> None:
    """Prepare the directory of a record of which every rank writes a file, rank-NNNN.*.

    Rank 0 removes the files of ranks that only an earlier attempt with more ranks had.

    Args:
        path: this rank's file.
        rank: this rank.
        ranks: number of ranks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.iterdir() if rank == 0 else ():
        number = re.fullmatch(r"rank-(\d+)\..*", left.name)
        if number and int(number[1]) >= ranks and left.is_file():
            left.unlink(missing_ok=True)


class JsonlSink:
    """JSON-lines file of records with a key `step`.

    Numbers that are not finite are written as NaN or Infinity. A record with a key `command` was written by
    another command than `train`. It is cut like the others, but is none of the run's steps.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record in one write, so that a killed run leaves whole lines, except perhaps the last."""
        append(self.path, json.dumps(record).encode() + b"\n")

    def cut_to(self, step: int) -> None:
        """Cut the file back to the lines up to this step; damaged lines go, too.

        Call it before the first write of a run, with step 0 for a new run.
        """
        with as_disk_error(self.path):
            try:
                file = open_regular(self.path)
            except FileNotFoundError:
                return
            with file:
                ranges = list(_ranges(file, step))
                end = file.seek(0, os.SEEK_END)
                whole = not end or _byte_at(file, end - 1) == b"\n"
                if whole and all(kept for _, _, kept in ranges):
                    return
                move_to_lost(self.path, file, [(begin, end) for begin, end, kept in ranges if not kept])
                with replace_atomically(self.path) as draft:
                    kept = [(begin, end) for begin, end, kept in ranges if kept]
                    _copy(file, draft, kept)
                    if kept and _byte_at(file, kept[-1][1] - 1) != b"\n":
                        draft.write(b"\n")

    def has(self, step: int) -> bool:
        """Whether training wrote a whole line of this step."""
        return step in self.steps()

    def steps(self) -> Iterator[int]:
        """Steps of the whole lines that training wrote, in file order."""
        try:
            with open_regular(self.path) as file:
                yield from (step for _, line in _lines(file)
                            if (step := _step_of(line, trained=True)) is not None)
        except FileNotFoundError:
            return
        except OSError as error:
            raise unreadable(self.path, error) from error


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield (length in bytes, content) of every line; the content of a line above MAX_LINE is empty."""
    while line := file.readline(MAX_LINE):
        length = len(line)
        while not line.endswith(b"\n") and (more := file.readline(MAX_LINE)):
            length, line = length + len(more), more
        yield length, line if length == len(line) else b""


def _ranges(file: BinaryIO, step: int) -> Iterator[tuple[int, int, bool]]:
    """Yield (first byte, end, whether its lines are kept) of runs of lines that are all kept or all cut."""
    begin = end = 0
    keeping = True
    for length, line in _lines(file):
        found = _step_of(line)
        kept = found is not None and found <= step
        if kept != keeping and end > begin:
            yield begin, end, keeping
            begin = end
        keeping, end = kept, end + length
    if end > begin:
        yield begin, end, keeping


def _step_of(line: bytes, *, trained: bool = False) -> int | None:
    """Step of a record; None for a damaged line and, with `trained`, for one of another command."""
    try:
        record = parse_json(line)
    except ValueError:
        return None
    step = record.get("step") if isinstance(record, dict) and not (trained and "command" in record) else None
    return step if type(step) is int else None


def _copy(file: BinaryIO, target: BinaryIO, ranges: list[tuple[int, int]]) -> None:
    for begin, end in ranges:
        file.seek(begin)
        while begin < end and (content := file.read(min(MAX_LINE, end - begin))):
            target.write(content)
            begin += len(content)


def _byte_at(file: BinaryIO, place: int) -> bytes:
    file.seek(place)
    return file.read(1)


@contextlib.contextmanager
def as_disk_error(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a DiskError that names the record."""
    try:
        yield
    except OSError as error:
        raise DiskError(20, "a record of the run cannot be written", where=str(path), why=reason(error),
                        next=f"{remedy(error)}, or run.dir=<another directory>; the same command resumes"
                        ) from error


def unreadable(path: Path, error: OSError) -> DiskError:
    """Return the error of a record that cannot be read."""
    return DiskError(40, "a record of the run cannot be read", where=str(path), why=reason(error),
                     next="move it away; the run goes on without it")


def append(path: Path, data: bytes) -> None:
    """Append bytes to a file, retrying for FULL_DISK_S while the disk is full.

    A save that did not fit frees its space within that time.
    """
    rest, until = memoryview(data), time.monotonic() + FULL_DISK_S
    with as_disk_error(path), open_to_append(path) as file:
        while rest:
            try:
                rest = rest[file.write(rest):]
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT) or time.monotonic() > until:
                    raise
                time.sleep(0.1)


def move_to_lost(path: Path, file: BinaryIO, ranges: list[tuple[int, int]]) -> None:
    """Append ranges of an open file to <path>.lost.

    Args:
        path: the file.
        file: the same, open for reading.
        ranges: (first byte, end) of each range. The caller removes them from the file.
    """
    place = path.with_name(path.name + ".lost")
    with as_disk_error(place), open_to_append(place) as lost:
        _copy(file, lost, ranges)
        _sync(lost)


@contextlib.contextmanager
def replace_atomically(path: Path) -> Iterator[Any]:
    """Open a new file for writing that replaces `path` atomically when the block ends without an error."""
    draft = path.with_name(path.name + ".tmp")
    with create(draft) as file:
        yield file
        _sync(file)
    draft.replace(path)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
