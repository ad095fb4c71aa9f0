"""Token files by their indexes: read whole once, then opened by what was found (data/tokens/index_file.py).

Training, evaluation and generation keep the indexes with prepared data, in data.cache or <run.dir>/data, one for each token file.
Its name tells which file it is of and how that was read; in it are the sizes and times of change of that time. An index of another
size or time, of other settings, or a damaged one, is made again. A file that is cut off while it is read leaves none, but those
of the files before it stay: the next start goes on there.

Of several ranks the first keeps, and the others take what it has found without comparing times, which differ between copies of a
file on several nodes. They read no token for it: as after any start that finds an index, a block of tokens is compared with its
checksum when it is first read (data/tokens/blocks.py).
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from moetrain.data.corpus.selection import Progress
from moetrain.data.pretokenized.token_files import TokenFile, token_file
from moetrain.data.tokens.index import Report, TokenIndex
from moetrain.data.tokens.index_file import SUFFIX, Kept, Stamp, read_index, write_index
from moetrain.data.tokens.shards import BLOCK, unwritable
from moetrain.errors import DataError, DiskError
from moetrain.files import reason, shown

Use = Literal["look", "keep", "share", "take"]

log = logging.getLogger(__name__)


class Wanted(NamedTuple):
    """A token file to open. beside: files that say how it is read."""

    path: Path
    beside: tuple[Path, ...] = ()


class TokenIndexes:
    """Where indexes are kept, and what this process does with them.

    Args:
        folder: of the indexes; None: there are none.
        use: `look` uses those that are there; `keep` also writes those that it has to make, and says so where it cannot; `share`
            does the same for other ranks, so that it is an error where it cannot; `take` uses those that another rank has shared.
        progress: called as bytes are read.
    """

    def __init__(self, folder: Path | None = None, *, use: Use = "look",
                 progress: Progress | None = None) -> None:
        assert folder is not None or use == "look", use
        self._folder, self._use, self._progress = folder, use, progress

    def open(self, files: Sequence[Wanted], *, settings: Sequence[Any], vocab_size: int,
             read: Callable[[Path, Report], TokenIndex]) -> list[TokenFile]:
        """The files, in order; DataError of `read` for the first one that it refuses.

        Args:
            files: to open.
            settings: what decides what is found in a file, beside its content; vocab_size need not be named.
            vocab_size: ids that there are.
            read: reads a file whole.
        """
        found = [_Found.of(file, [vocab_size, *settings]) for file in files]
        kept = [self._taken(one) if self._use == "take" else self._known(one) for one in found]
        total = sum(one.size for one, index in zip(found, kept) if index is None)
        done, opened = 0, []
        for one, index in zip(found, kept):
            fresh = index is None
            if index is None:
                index = read(one.path, partial(self._report, done, total))
                done += one.size
                self._keep(one, index)
            opened.append(token_file(one.path, one.status or os.stat(one.path), index, vocab_size=vocab_size,
                                     checked=fresh))
        return opened

    def _report(self, before: int, total: int, done: int) -> None:
        if self._progress is not None:
            self._progress("reading tokens", before + done, total)

    def _known(self, found: "_Found") -> TokenIndex | None:
        """The index of a file that has not changed since; None where there is none, or it is of no use."""
        if self._folder is None or found.status is None:
            return None
        try:
            kept = read_index(self._folder / found.name)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            log.warning("%s is of no use (%s): %s is read again", shown(self._folder / found.name),
                        reason(error), shown(found.path))
            return None
        return kept.index if (kept.key, kept.stamps) == (found.key, found.stamps) else None

    def _taken(self, found: "_Found") -> TokenIndex:
        """The index that another rank has just checked or made."""
        assert self._folder is not None
        path = self._folder / found.name
        try:
            kept = read_index(path)
            sizes, here = ([stamp[0] for stamp in stamps] for stamps in (kept.stamps, found.stamps))
            if kept.key == found.key and sizes == here:
                return kept.index
            why = f"{path} is of another file"
            if kept.key == found.key:
                why = f"{path} is of {sizes} bytes, and here there are {here}"
        except (OSError, ValueError) as error:
            why = f"{path}: {reason(error)}"
        raise DataError(167, "this rank does not see what rank 0 has found in a token file",
                        where=str(found.path), why=why,
                        next="data.cache=<a folder that all nodes see>, and the same token files on each of "
                             "them")

    def _keep(self, found: "_Found", index: TokenIndex) -> None:
        if self._folder is None or self._use == "look" or found.status is None:
            return
        try:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise unwritable(self._folder, error) from error
            write_index(self._folder / found.name, Kept(found.key, found.stamps, index))
        except DiskError as error:
            if self._use == "share":
                raise
            log.warning("what was found in %s cannot be kept in %s (%s): the next start reads it again",
                        shown(found.path), shown(self._folder), error.why)


class _Found(NamedTuple):
    """A file as it lies there, before it is opened. status: None where it is not there."""

    path: Path
    status: os.stat_result | None
    key: list[Any]
    stamps: list[Stamp]

    @classmethod
    def of(cls, file: Wanted, settings: Sequence[Any]) -> "_Found":
        key = [BLOCK, os.path.abspath(file.path), *settings]
        try:
            every = [os.stat(path) for path in (file.path, *file.beside)]
        except OSError:
            return cls(file.path, None, key, [])
        return cls(file.path, every[0], key, [[one.st_size, one.st_mtime_ns, one.st_ctime_ns]
                                              for one in every])

    @property
    def size(self) -> int:
        return self.status.st_size if self.status else 0

    @property
    def name(self) -> str:
        """Of its index."""
        return hashlib.sha256(json.dumps(self.key).encode()).hexdigest()[:16] + SUFFIX
