"""Temporary storage for texts between the two passes of a preparation.

The file has no name, so nothing is left behind however the process ends.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from moetrain.data.reading.text_blocks import BLOCK, blocks_of
from moetrain.data.tokens.shards import unwritable


class Spool:
    """Append-only file of texts; a context manager.

    Args:
        folder: where there is room for the file. It is created with the first text.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: BinaryIO | None = None
        self.size = 0

    def append(self, text: bytes) -> int:
        """Store a text and return the byte at which it begins."""
        try:
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)
            start, rest = self.size, memoryview(text)
            while rest:
                written = os.pwrite(self._file.fileno(), rest, self.size)
                self.size, rest = self.size + written, rest[written:]
        except OSError as error:
            raise unwritable(self._folder, error) from error
        return start

    def cut(self, size: int) -> None:
        """Truncate to the first `size` bytes."""
        if self._file is not None:
            self._file.truncate(size)
        self.size = size

    def blocks(self, start: int, size: int) -> Iterator[bytes]:
        """`size` bytes from `start` on, in the blocks of `blocks_of`."""
        if size <= BLOCK:
            return iter((os.pread(self._file.fileno(), size, start),))
        end = start + size

        def read(most: int) -> bytes:
            nonlocal start
            content = os.pread(self._file.fileno(), min(most, end - start), start) if start < end else b""
            start += len(content)
            return content

        return blocks_of(read)

    def unpacked(self, read: Callable[[int], bytes]) -> BinaryIO:
        """Copy everything that `read` returns to another nameless file, and return it at its start."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            file = tempfile.TemporaryFile(dir=self._folder)
            while content := read(BLOCK):
                file.write(content)
            file.seek(0)
        except OSError as error:
            raise unwritable(self._folder, error) from error
        return file

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()
