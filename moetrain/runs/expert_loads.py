"""Expert loads of a run: tokens per expert of every router, one record a step.

    log/loads/*.i32           appended every step; loads.npz is built from them
    log/loads/routers.json    number of experts of each router by name; where some choices are no experts, the
                              numbers of experts and of choices

The loads of a router are those of all its choices; its experts are the first of them.

A resumed run cuts its records back to the restored step; what is cut goes to
<file>.lost and is never deleted.
"""

import json
import logging
import os
import re
import stat
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from moetrain.files import open_descriptor, open_regular, read_json, reason
from moetrain.runs.files import append, as_disk_error, move_to_lost, replace_atomically

log = logging.getLogger(__name__)

ROUTERS = "routers.json"
BLOCK_BYTES = 16 << 20  # records read at once


class Block(NamedTuple):
    """Records in memory; all arrays are int64."""

    steps: np.ndarray    # [n]
    loads: np.ndarray    # [n, routers, E_max]
    sources: np.ndarray  # [n, routers, ranks, E_max]


class RecordFile(NamedTuple):
    """File of equally long int32 records of consecutive steps.

    A record is the step, then loads [routers, E_max], then sources [routers, ranks, E_max].
    """

    path: Path
    first: int    # step of the first record
    routers: int
    experts: int  # E_max, choices of the largest router
    ranks: int    # 0 where sources were not recorded

    @property
    def record_bytes(self) -> int:
        """Length of a record."""
        return 4 * (1 + (1 + self.ranks) * self.routers * self.experts)

    def records(self) -> int:
        """Number of whole records in the file now."""
        return self.path.stat().st_size // self.record_bytes

    def blocks(self, records: int) -> Iterator[Block]:
        """Read the first `records` records, a few at a time, and leave out those that were altered."""
        cells, many = self.routers * self.experts, max(1, BLOCK_BYTES // self.record_bytes)
        with open_regular(self.path, links=False) as file:
            for begin in range(0, records, many):
                count = min(many, records - begin)
                rows = np.frombuffer(
                    file.read(count * self.record_bytes), "<i4").reshape(count, -1).astype(np.int64)
                rows = rows[(rows[:, 0] == np.arange(count) + self.first + begin) & (rows >= 0).all(1)]
                yield Block(rows[:, 0], rows[:, 1:1 + cells].reshape(len(rows), self.routers, self.experts),
                            rows[:, 1 + cells:].reshape(len(rows), self.routers, self.ranks, self.experts))


class LoadsLog:
    """The records below `dir`, and the names of the routers.

    A run that starts or resumes opens a new file, because the number of ranks may have changed. A step
    appends its own record and nothing else; loads.npz, which holds them all, is built on demand.
    """

    def __init__(self, dir: Path) -> None:
        self.dir = Path(dir)
        self._current: RecordFile | None = None

    def name_routers(self, experts: Mapping[str, int], choices: Mapping[str, int] | None = None) -> None:
        """Write routers.json.

        Args:
            experts: number of experts by router, in run order.
            choices: number of choices by router; None: every choice is an expert.
        """
        path = self.dir / ROUTERS
        choices = choices or experts
        numbers = {name: number if number == choices[name] else [number, choices[name]]
                   for name, number in experts.items()}
        with as_disk_error(path):
            self.dir.mkdir(parents=True, exist_ok=True)
            with replace_atomically(path) as file:
                file.write(json.dumps(numbers).encode())

    def write(self, step: int, loads: Sequence[ArrayLike],
              sources: Sequence[ArrayLike] | None = None) -> None:
        """Append the record of a step.

        Args:
            step: number of the step.
            loads: [C] for each router, tokens per choice.
            sources: [ranks, C] for each router, the same tokens by the rank that they came from.
        """
        loads = [np.asarray(load)[None] for load in loads]
        blocks = loads + [np.asarray(source) for source in ([] if sources is None else sources)]
        widest = max((block.shape[1] for block in blocks), default=0)
        padded = [np.pad(block, ((0, 0), (0, widest - block.shape[1]))) for block in blocks]
        record = np.concatenate([np.array([step]), *(block.ravel() for block in padded)])
        assert record.max() < 2**31 and record.min() >= 0, (step, record.max(), record.min())
        ranks = len(padded[-1]) if len(padded) > len(loads) else 0
        if self._current is None:
            name = f"{step:08d}-{len(loads)}x{widest}-{ranks}.i32"
            self._current = RecordFile(self.dir / name, step, len(loads), widest, ranks)
        assert 4 * record.size == self._current.record_bytes, "the routers and ranks of a run do not change"
        with as_disk_error(self.dir):
            self.dir.mkdir(parents=True, exist_ok=True)
        append(self._current.path, record.astype("<i4").tobytes())

    def cut_to(self, step: int) -> None:
        """Cut the files back to the records up to this step.

        Call it before the first write of a run, with step 0 for a new run.
        """
        self._current = None
        for record_file in self._record_files():
            with (as_disk_error(record_file.path),
                  open(open_descriptor(record_file.path, os.O_RDWR, links=False), "r+b") as file):
                size = file.seek(0, os.SEEK_END)
                kept = (min(max(0, step + 1 - record_file.first), size // record_file.record_bytes)
                        * record_file.record_bytes)
                if kept < size:
                    move_to_lost(record_file.path, file, [(kept, size)])
                    file.truncate(kept)
            if not kept:
                record_file.path.unlink()

    def write_npz(self, path: Path) -> bool:
        """Build loads.npz from the records, a few at a time.

        Entries beyond a router's choices are 0. The array `choices` exists where some of them are no
        experts. The array `sources` exists where any step recorded
        it: it is -1 in steps that did not, and 0 for ranks that a step did not have. Raises OSError
        where the file cannot be written.

        Returns:
            False where the routers are not recorded; nothing is written then.
        """
        routers = self._routers()
        if routers is None:
            return False
        experts, choices = (np.array([of[part] for of in routers.values()], np.int64) for part in (0, 1))
        shape = (len(routers), int(choices.max(initial=0)))
        record_files = {record_file: record_file.records() for record_file in self._record_files()
                        if (record_file.routers, record_file.experts) == shape}
        ranks = max((record_file.ranks for record_file in record_files), default=0)
        steps = np.concatenate(
            [np.zeros(0, np.int64), *(block.steps for _, block in _blocks_in_order(record_files))])
        if len(steps) < sum(record_files.values()):
            log.warning("%s: %d records are damaged and left out",
                        self.dir, sum(record_files.values()) - len(steps))
        with replace_atomically(path) as file, zipfile.ZipFile(file, "w") as archive:
            _add_array(archive, "loads", (len(steps), *shape),
                       (block.loads for _, block in _blocks_in_order(record_files)))
            if ranks:
                _add_array(archive, "sources", (len(steps), shape[0], ranks, shape[1]),
                           (_pad_ranks(block.sources, record_file, ranks)
                            for record_file, block in _blocks_in_order(record_files)))
            beyond = {} if (experts == choices).all() else {"choices": choices}
            for name, array in {**beyond, "experts": experts, "routers": np.array(list(routers), np.str_),
                                "steps": steps}.items():
                _add_array(archive, name, array.shape, [array], array.dtype)
        return True

    def is_built(self, path: Path) -> bool:
        """Whether loads.npz exists and no step was recorded after it was built."""
        newest = max((record_file.path.stat().st_mtime_ns for record_file in self._record_files()), default=0)
        return path.is_file() and path.stat().st_mtime_ns >= newest

    def _routers(self) -> dict[str, tuple[int, int]] | None:
        """Numbers of experts and choices of each router; None where they are not recorded.

        Runs of older releases do not have them.
        """
        path = self.dir / ROUTERS
        try:
            found = read_json(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            log.warning("%s cannot be read (%s); loads.npz stays as it is", path, reason(error))
            return None
        if not isinstance(found, dict):
            return None
        routers = {name: (of, of) if type(of) is int else tuple(of) if type(of) is list else ()
                   for name, of in found.items()}
        fits = all(len(of) == 2 and all(type(number) is int for number in of) and 0 < of[0] <= of[1] < 1 << 20
                   for of in routers.values())
        return routers if fits else None

    def _record_files(self) -> list[RecordFile]:
        found = [(path, re.fullmatch(r"(\d{8,12})-(\d{1,6})x(\d{1,6})-(\d{1,6})\.i32", path.name))
                 for path in self.dir.glob("*.i32")]
        return sorted((RecordFile(path, *map(int, match.groups()))
                       for path, match in found if match and _is_plain(path)),
                      key=lambda record_file: record_file.first)


def _is_plain(path: Path) -> bool:
    """Whether a path is a regular file: no folder or pipe, and no link, which would lead out of the run."""
    plain = stat.S_ISREG(path.lstat().st_mode)
    if not plain:
        log.warning("%s is not a file of the run; it is left alone", path)
    return plain


def _blocks_in_order(record_files: Mapping[RecordFile, int]) -> Iterator[tuple[RecordFile, Block]]:
    """Yield the records of all files, each step once. The mapping gives the records to read of each file."""
    last = -1
    for record_file, records in record_files.items():
        for block in record_file.blocks(records):
            block = Block(*(array[block.steps > last] for array in block))
            last = max([last, *block.steps[-1:].tolist()])
            yield record_file, block


def _add_array(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], blocks: Iterable[np.ndarray],
         dtype: np.dtype = np.dtype("<i8")) -> None:
    """Write an array into the archive block by block, with one block in memory at a time.

    Args:
        archive: the .npz file, open for writing.
        name: of the array.
        shape: of the whole array.
        blocks: its rows, in order.
        dtype: type to store.
    """
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(
            member, {"descr": dtype.str, "fortran_order": False, "shape": shape})
        for block in blocks:
            member.write(np.ascontiguousarray(block, dtype).tobytes())


def _pad_ranks(sources: np.ndarray, record_file: RecordFile, ranks: int) -> np.ndarray:
    """Pad the sources of a file's records to [steps, routers, ranks, E_max]."""
    if not record_file.ranks:
        return np.full((len(sources), record_file.routers, ranks, record_file.experts), -1, dtype=np.int64)
    return np.pad(sources, ((0, 0), (0, 0), (0, ranks - record_file.ranks), (0, 0)))
