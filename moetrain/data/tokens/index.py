"""Index of a token file: checksums, document starts and end token, found by reading the file once.

    read_once      reads a file from its first token to its last and refuses ids outside the vocabulary
    TokenIndex     the result. pretokenized/token_indexes.py stores it, so that neither another rank nor a
                   later start reads the whole file again
"""

import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from moetrain.data.tokens.shards import BLOCK
from moetrain.errors import DataError
from moetrain.files import reason

Report = Callable[[int], None]               # called with the bytes of a file read so far


class Ending(NamedTuple):
    """The token that documents end in.

    Args:
        id: the last token of most documents.
        share: share of the documents that end in it.
        inside: how often it occurs inside documents.
    """

    id: int
    share: float
    inside: int


class TokenIndex(NamedTuple):
    """Index of one token file.

    Args:
        format: name of the file's format, as shown to a user.
        start: byte of the first token.
        dtype: type of an id.
        checksums: CRC-32 of every block of BLOCK tokens.
        starts: int64 [documents + 1], first token of each document, then the number of tokens.
        ending: the token that closes documents; None where no such id is known.
    """

    format: str
    start: int
    dtype: np.dtype
    checksums: list[int]
    starts: np.ndarray
    ending: Ending | None

    @property
    def tokens(self) -> int:
        return int(self.starts[-1])

    @property
    def documents(self) -> int:
        return len(self.starts) - 1


class FileErrors:
    """Errors about token files of other programs, which must not change between reading and use."""

    def unreadable(self, path: Path, error: OSError) -> DataError:
        return self._changed(path, reason(error))

    def altered(self, path: Path, offset: int, why: str) -> DataError:
        return self._changed(path, f"from byte {offset:,} on: {why}")

    def truncated(self, path: Path, size: int, expected: int) -> DataError:
        return self._changed(path, f"{size:,} bytes instead of {expected:,}")

    def outside(self, path: Path, place: str, id: int, vocab_size: int, advice: str = "") -> DataError:
        return DataError(73, "a token id is outside the vocabulary", where=f"{path}, {place}",
                         why=f"id {id} with a vocabulary of {vocab_size:,}",
                         next="data.tokenizer=<the tokenizer.json that made the ids>, or data.tokenizer=none "
                              "with a larger "
                              f"data.vocab_size{advice}")

    def _changed(self, path: Path, why: str) -> DataError:
        return DataError(122, "a token file was changed while it was in use", where=str(path), why=why,
                         next="restore the file; the same command goes on from the last save")


def read_once(file: BinaryIO, path: Path, *, start: int, tokens: int, dtype: np.dtype, vocab_size: int,
              visit: Callable[[int, np.ndarray], None], report: Report, advice: str = "") -> list[int]:
    """Read a file of token ids from start to end. DataError if an id is outside the vocabulary.

    Args:
        file: the file, open for reading.
        path: its name, for errors.
        start: byte of the first token.
        tokens: number of tokens; the file was seen to have them.
        dtype: type of an id.
        vocab_size: valid ids are 0 to vocab_size - 1.
        visit: called with the position of each block's first token, and the block.
        report: called with the bytes read so far, after each block.
        advice: further remedy in the error about an id outside the vocabulary.

    Returns:
        CRC-32 of every block of BLOCK tokens.
    """
    checksums = []
    for begin in range(0, tokens, BLOCK):
        length = min(BLOCK, tokens - begin) * dtype.itemsize
        content = os.pread(file.fileno(), length, start + begin * dtype.itemsize)
        if len(content) < length:
            raise FileErrors().truncated(path, os.fstat(file.fileno()).st_size,
                                         start + tokens * dtype.itemsize)
        block = np.frombuffer(content, dtype)
        checksums.append(zlib.crc32(block))
        if int(block.max()) >= vocab_size or int(block.min()) < 0:
            place = int(np.argmax((block >= vocab_size) | (block < 0)))
            raise FileErrors().outside(path, f"token {begin + place:,}", int(block[place]), vocab_size,
                                       advice)
        visit(begin, block)
        report(start + begin * dtype.itemsize + length)
    return checksums
