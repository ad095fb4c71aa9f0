"""The tokens of a file, read by position: a block is compared with its checksum when it is first read.

Read with `pread`, not memory-mapped: a file that is cut short while it is in use is an error here and SIGBUS there. A
block is checked again once the file's time of change has moved, which is looked at every second.
"""

import os
import time
import weakref
import zlib
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from moetrain.errors import DataError
from moetrain.files import open_descriptor, reason

LOOK_S = 1.0
MOST_OPEN = 64  # descriptors, of all shards together: a corpus may have more shards than a process may open


class Errors(Protocol):
    """What is raised about a file that cannot be used."""

    def unreadable(self, path: Path, error: OSError) -> DataError: ...

    def altered(self, path: Path, offset: int, why: str) -> DataError: ...

    def truncated(self, path: Path, size: int, expected: int) -> DataError: ...

    def outside(self, path: Path, place: str, id: int, vocab_size: int) -> DataError: ...


class Layout(NamedTuple):
    """Where tokens lie in a file. checksums: CRC-32 of every `block` tokens."""

    start: int                       # byte
    tokens: int
    dtype: np.dtype
    checksums: list[int]
    block: int
    vocab_size: int


class TokenBlocks:
    """Tokens of one file.

    Args:
        path: the file.
        layout: where its tokens lie.
        offsets: of its documents, to name a token by its place.
        found: the file as it was when the layout was read.
        errors: what is raised about it; None: that of a shard.
        links: whether the path itself may be a link.
        checked: whether all of it has been compared with its checksums just now.
    """

    def __init__(self, path: Path, layout: Layout, offsets: np.ndarray, found: os.stat_result, *,
                 errors: Errors | None = None, links: bool = False, checked: bool = False) -> None:
        self.path, self.layout, self._offsets, self._links = path, layout, offsets, links
        self._errors = errors or ShardErrors()
        self._identity, self._seen = (found.st_dev, found.st_ino), _state(found)
        self._size, self._looked = found.st_size, time.monotonic()
        self._open: weakref.ref[_Descriptor] | None = None           # the cache of _opened keeps it
        self._checked = np.full(len(layout.checksums), checked)

    def __len__(self) -> int:
        return self.layout.tokens

    def read(self, begin: int, end: int) -> np.ndarray:
        """Tokens begin to end as they lie in the file; DataError where they are not what was written."""
        self._look()
        block = self.layout.block
        for number in range(begin // block, -(-end // block)):
            if not self._checked[number]:
                self._check(number)
        return self._tokens(begin, end)

    def verify(self) -> None:
        """Check every block, one after another."""
        self._look()
        for number in range(len(self._checked)):
            self._check(number)

    def _look(self) -> None:
        """Forget what was checked where somebody has written to the file since."""
        if (now := time.monotonic()) - self._looked < LOOK_S:
            return
        self._looked, found = now, os.fstat(self._descriptor().number)
        if _state(found) == self._seen:
            return
        if found.st_size != self._size:
            self._cut_short(found.st_size)
        self._seen = _state(found)
        self._checked[:] = False

    def _check(self, number: int) -> None:
        layout, first = self.layout, number * self.layout.block
        ids = self._tokens(first, min(first + layout.block, len(self)))
        if zlib.crc32(ids) != layout.checksums[number]:
            raise self._errors.altered(self.path, layout.start + first * layout.dtype.itemsize,
                                       f"the checksum of block {number} ({ids.nbytes:,} bytes from here on) "
                                       "does not match")
        if int(ids.max()) >= layout.vocab_size:
            self._refuse_id(first + int(np.argmax(ids >= layout.vocab_size)), int(ids.max()))
        self._checked[number] = True

    def _refuse_id(self, position: int, id: int) -> None:
        document = int(np.searchsorted(self._offsets, position, "right")) - 1
        place = f"document {document}, token {position - int(self._offsets[document])}"
        raise self._errors.outside(self.path, place, id, self.layout.vocab_size)

    def _tokens(self, begin: int, end: int) -> np.ndarray:
        width = self.layout.dtype.itemsize
        place, length = self.layout.start + begin * width, (end - begin) * width
        descriptor = self._descriptor()
        try:
            content = os.pread(descriptor.number, length, place)
            while (len(content) < length
                       and (more := os.pread(descriptor.number, length - len(content), place + len(content)))):
                content += more
        except OSError as error:
            raise self._errors.unreadable(self.path, error) from error
        if len(content) < length:
            self._cut_short(os.fstat(descriptor.number).st_size)
        return np.frombuffer(content, self.layout.dtype)

    def _descriptor(self) -> "_Descriptor":
        descriptor = self._open and self._open()
        if descriptor is None:
            try:
                descriptor = _opened(self.path, self._identity, self._links)
            except OSError as error:
                raise self._errors.unreadable(self.path, error) from error
            self._open = weakref.ref(descriptor)
        return descriptor

    def _cut_short(self, size: int) -> None:
        raise self._errors.truncated(self.path, size, self._size)


class _Descriptor:
    """An open file, closed with the last reference to it."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


@lru_cache(maxsize=MOST_OPEN)
def _opened(path: Path, identity: tuple[int, int], links: bool) -> _Descriptor:
    descriptor = _Descriptor(open_descriptor(path, os.O_RDONLY, links=links))
    found = os.fstat(descriptor.number)
    if (found.st_dev, found.st_ino) != identity:
        raise OSError(0, "another file has taken its place while it was in use")
    return descriptor


def _state(found: os.stat_result) -> tuple[int, int]:
    return found.st_size, found.st_mtime_ns


# --- what is said of a shard that cannot be used


class ShardErrors:
    """A shard is of prepared tokens: the text may be prepared again."""

    def unreadable(self, path: Path, error: OSError) -> DataError:
        return DataError(1, "a token shard cannot be read", where=str(path), why=reason(error),
                         next="check data.path, or prepare the text again with data=text")

    def altered(self, path: Path, offset: int, why: str) -> DataError:
        return damaged(7, path, "a token shard was altered", offset, why)

    def truncated(self, path: Path, size: int, expected: int) -> DataError:
        state = "truncated" if size < expected else "longer than its header says"
        return damaged(6, path, f"a token shard is {state}", min(size, expected),
                       f"{size:,} bytes instead of {expected:,}")

    def outside(self, path: Path, place: str, id: int, vocab_size: int) -> DataError:
        return DataError(8, "a token id is outside the vocabulary", where=f"{path}, {place}",
                         why=f"id {id} with vocab_size={vocab_size}",
                         next="prepare the text again with the tokenizer of the model (data.tokenizer)")


def damaged(number: int, path: Path, what: str, offset: int, why: str) -> DataError:
    """The folder is somebody's data: it is moved, never removed."""
    return DataError(number, what, where=f"{path}, byte {offset:,}", why=why,
                     next="restore the file from a copy, or move the folder away and prepare the text again "
                          "with data=text")
