"""Store of the indexes of token files: each file is read whole once, then opened by its index.

Training, evaluation and generation keep indexes with prepared data, in `data.cache` or `<run.dir>/data`, one
for each token file. The name of an index tells which file it is of and how that was read; inside are sizes
and modification times of that moment. An index of another size or time, of other settings, or a damaged one,
is made again. A file that is truncated while it is read leaves none, but the indexes of the files before it
stay, and the next start continues from there.

Of several ranks the first keeps indexes. The others take them without comparing times, which differ between
copies of a file on several nodes. They read no token for that: as after any start that finds an index, a
block of tokens is compared with its checksum when it is first read (`tokens/blocks.py`).
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
from moetrain.data.tokens.index_file import SUFFIX, Stamp, StoredIndex, read_index, write_index
from moetrain.data.tokens.shards import BLOCK, unwritable
from moetrain.errors import DataError, DiskError
from moetrain.files import reason, shown

Use = Literal["look", "keep", "share", "take"]

log = logging.getLogger(__name__)


class FileRequest(NamedTuple):
    """A token file to open.

    Args:
        path: the file.
        beside: files that say how it is read, such as a Megatron .idx.
    """

    path: Path
    beside: tuple[Path, ...] = ()


class TokenIndexes:
    """The indexes of a folder, and what this process may do with them.

    Args:
        folder: folder of the indexes; None if there are none.
        use: `look` uses existing indexes. `keep` also writes those that it makes, and warns where it cannot.
            `share` writes them for other ranks, so a failure is an error. `take` uses those that another rank
            has shared.
        progress: called as bytes are read.
    """

    def __init__(self, folder: Path | None = None, *, use: Use = "look",
                 progress: Progress | None = None) -> None:
        assert folder is not None or use == "look", use
        self._folder, self._use, self._progress = folder, use, progress

    def open(self, files: Sequence[FileRequest], *, settings: Sequence[Any], vocab_size: int,
             read: Callable[[Path, Report], TokenIndex]) -> list[TokenFile]:
        """Open files, in order. Raises the DataError of `read` for the first file that it refuses.

        Args:
            files: the files.
            settings: what decides, beside its content and vocab_size, what is found in a file.
            vocab_size: ids of the vocabulary.
            read: reads a file whole and returns its index.
        """
        found = [_FileState.of(file, [vocab_size, *settings]) for file in files]
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

    def _known(self, found: "_FileState") -> TokenIndex | None:
        """Index of a file that has not changed since; None if there is none that can be used."""
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

    def _taken(self, found: "_FileState") -> TokenIndex:
        """Index that another rank has just checked or made."""
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
                        next="data.cache=<a folder that all nodes see>, and the same token files on each "
                             "of them")

    def _keep(self, found: "_FileState", index: TokenIndex) -> None:
        """Write an index if this process keeps them."""
        if self._folder is None or self._use == "look" or found.status is None:
            return
        try:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise unwritable(self._folder, error) from error
            write_index(self._folder / found.name, StoredIndex(found.key, found.stamps, index))
        except DiskError as error:
            if self._use == "share":
                raise
            log.warning("what was found in %s cannot be kept in %s (%s): the next start reads it again",
                        shown(found.path), shown(self._folder), error.why)


class _FileState(NamedTuple):
    """A file as it is before it is opened.

    Args:
        path: the file.
        status: its stat result; None if it is not there.
        key: what its index depends on, beside its content.
        stamps: state of the file and of those beside it.
    """

    path: Path
    status: os.stat_result | None
    key: list[Any]
    stamps: list[Stamp]

    @classmethod
    def of(cls, file: FileRequest, settings: Sequence[Any]) -> "_FileState":
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
        """File name of its index."""
        return hashlib.sha256(json.dumps(self.key).encode()).hexdigest()[:16] + SUFFIX
