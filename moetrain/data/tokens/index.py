"""What one reading of a token file finds, and nothing else would: checksums, where documents begin, what they end in.

    read_once      reads a file from its first token to its last; no id lies outside the vocabulary
    TokenIndex     what was found. data/pretokenized/token_indexes.py keeps it, so that neither another rank nor a later start reads again
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

Report = Callable[[int], None]               # called with the bytes of a file that are read so far


class Ending(NamedTuple):
    """What documents end in. id: a last token; share: of the documents that end in it; inside: how often it occurs elsewhere."""

    id: int
    share: float
    inside: int


class TokenIndex(NamedTuple):
    """What is known of a file.

    format: as a person names it. start: byte of the first token. checksums: CRC-32 of every block of BLOCK tokens.
    starts: int64 [documents + 1], first token of every document, and the end. ending: None where no id is known to close documents.
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
    """A file is as it was when it was read, or it is refused."""

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
    """Checksums of the blocks of a file; DataError where an id is outside the vocabulary.

    Args:
        file: open for reading.
        path: its name.
        start: first byte of the tokens.
        tokens: how many there are; the file was seen to have them.
        dtype: of an id.
        vocab_size: ids that there are.
        visit: called with the number of the first token of every block, and the block.
        report: called as blocks are read.
        advice: what else may help against an id outside the vocabulary.
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
