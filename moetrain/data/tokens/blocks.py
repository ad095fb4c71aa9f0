"""Tokens of a file, read by position. Each block is compared with its checksum when it is first read.

Files are read with `pread` instead of a memory map: a file that is truncated while in use raises an error
here, and would end the process by SIGBUS there. A block is checked again after the file's modification time
has changed, which is looked at once a second.
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
MOST_OPEN = 64                       # descriptors: a corpus may have more shards than a process may open


class Errors(Protocol):
    """Factory of the errors about one kind of file, so that messages fit shards and token files alike."""

    def unreadable(self, path: Path, error: OSError) -> DataError: ...

    def altered(self, path: Path, offset: int, why: str) -> DataError: ...

    def truncated(self, path: Path, size: int, expected: int) -> DataError: ...

    def outside(self, path: Path, place: str, id: int, vocab_size: int) -> DataError: ...


class Layout(NamedTuple):
    """Where the tokens lie in a file.

    Args:
        start: byte of the first token.
        tokens: number of tokens.
        dtype: type of an id.
        checksums: CRC-32 of every `block` tokens.
        block: tokens under one checksum.
        vocab_size: an id at or above it is refused.
    """

    start: int
    tokens: int
    dtype: np.dtype
    checksums: list[int]
    block: int
    vocab_size: int


class TokenBlocks:
    """Tokens of one file, read and verified block by block.

    Args:
        path: the file.
        layout: where its tokens lie.
        offsets: int64 [documents + 1], first token of each document; names a bad token by document and place.
        found: stat result of the file from when the layout was read.
        errors: factory of the errors raised; None takes those of a token shard.
        links: whether `path` itself may be a symbolic link.
        checked: whether every block has been compared with its checksum just now.
    """

    def __init__(self, path: Path, layout: Layout, offsets: np.ndarray, found: os.stat_result, *,
                 errors: Errors | None = None, links: bool = False, checked: bool = False) -> None:
        self.path, self.layout, self._offsets, self._links = path, layout, offsets, links
        self._errors = errors or ShardErrors()
        self._identity, self._seen = (found.st_dev, found.st_ino), _state(found)
        self._size, self._looked = found.st_size, time.monotonic()
        self._open: weakref.ref[_Descriptor] | None = None           # kept alive by the cache of `_opened`
        self._checked = np.full(len(layout.checksums), checked)

    def __len__(self) -> int:
        return self.layout.tokens

    def read(self, begin: int, end: int) -> np.ndarray:
        """Tokens `begin` to `end` in the file's dtype; DataError if they are not what was written."""
        self._look()
        block = self.layout.block
        for number in range(begin // block, -(-end // block)):
            if not self._checked[number]:
                self._check(number)
        return self._tokens(begin, end)

    def verify(self) -> None:
        """Compare every block with its checksum."""
        self._look()
        for number in range(len(self._checked)):
            self._check(number)

    def _look(self) -> None:
        """Forget which blocks were checked if the file has been written to since."""
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
            while rest := length - len(content):
                if not (more := os.pread(descriptor.number, rest, place + len(content))):
                    break
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
    """An open file descriptor, closed with the last reference to it."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


@lru_cache(maxsize=MOST_OPEN)
def _opened(path: Path, identity: tuple[int, int], links: bool) -> _Descriptor:
    """Open a file through a cache of MOST_OPEN descriptors. `identity` is its device and inode."""
    descriptor = _Descriptor(open_descriptor(path, os.O_RDONLY, links=links))
    found = os.fstat(descriptor.number)
    if (found.st_dev, found.st_ino) != identity:
        raise OSError(0, "another file has taken its place while it was in use")
    return descriptor


def _state(found: os.stat_result) -> tuple[int, int]:
    return found.st_size, found.st_mtime_ns


# --- errors about shards


class ShardErrors:
    """Errors about token shards. Their text can be prepared again, which the advice says."""

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
    """An error about a damaged file of prepared data.

    The advice is to move the folder away, never to remove it: the data may exist nowhere else.

    Args:
        number: number of the error code.
        path: the damaged file.
        what: the first line of the message.
        offset: byte at which the damage shows.
        why: what is wrong there.
    """
    return DataError(number, what, where=f"{path}, byte {offset:,}", why=why,
                     next="restore the file from a copy, or move the folder away and prepare the text again "
                          "with data=text")
