"""Files as streams of bytes, decompressed where their content says so: gzip and Zstandard, whatever the name.

A stream is read a block at a time, so that memory does not grow with what a file unpacks to: a file of a few kilobytes may
unpack to gigabytes. Several members or frames in a row are one stream. What is damaged or cut off is an error that names
the place, never an early end.
"""

import gzip
import sys
from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

from moetrain.errors import DataError
from moetrain.files import open_regular, reason


class Compression(NamedTuple):
    name: str
    magic: bytes
    suffix: str
    unpack: str                     # a command that unpacks a file
    open: Callable[[Any], Any]      # a binary file of compressed bytes -> one of what it holds


def _open_zstd(file: Any) -> Any:
    # The interface of Python 3.14's own module. The package zstandard takes a frame that was cut off for a whole one.
    if sys.version_info >= (3, 14):
        from compression.zstd import ZstdFile
    else:
        from backports.zstd import ZstdFile
    return ZstdFile(file)


COMPRESSIONS = (
    Compression("gzip", b"\x1f\x8b", ".gz", "gzip -d", lambda file: gzip.GzipFile(fileobj=file)),
    Compression("Zstandard", b"\x28\xb5\x2f\xfd", ".zst", "zstd -d --long=31", _open_zstd),    # a window of 2 GiB
)


class ByteStream:
    """The bytes of a file from its start, decompressed. A context manager.

    compression: None where the file holds them as they are.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._read = path, 0
        self._file = open_regular(path)
        head = self._file.read(4)
        self._file.seek(0)
        self.compression = next((form for form in COMPRESSIONS if head.startswith(form.magic)), None)
        self._content = self.compression.open(self._file) if self.compression else self._file

    def read(self, size: int) -> bytes:
        """The next bytes: `size` of them, fewer only at the end."""
        return self._next(self._content.read, size)

    def line(self, limit: int) -> bytes:
        """The next line with its end, or its first `limit` bytes; nothing at the end of the file."""
        return self._next(self._content.readline, limit)

    @property
    def position(self) -> int:
        """Bytes of the file that were read: a measure of progress, ahead by a buffer."""
        return self._file.tell()

    def _next(self, read: Callable[[int], bytes], size: int) -> bytes:
        try:
            content = read(size)
        except Exception as error:       # EOFError, gzip.BadGzipFile, zlib.error, ZstdError; an OSError of the system has an errno
            if self.compression is None or getattr(error, "errno", None) is not None:
                raise
            raise self._damaged(self.compression, error) from error
        self._read += len(content)
        return content

    def _damaged(self, compression: Compression, error: Exception) -> DataError:
        return DataError(102, "a compressed file cannot be read to its end",
                         where=f"{self.path}, byte {self.position:,} or before, after {self._read:,} bytes of text",
                         why=f"{compression.name}: {reason(error)}",
                         next=f"copy the file again, or unpack it by {compression.unpack} {quote(str(self.path))}")

    def __enter__(self) -> "ByteStream":
        return self

    def __exit__(self, *exception: object) -> None:
        self._content.close()
        self._file.close()


def inner_name(name: str) -> str:
    """The name without the suffix of a compression."""
    return next((name.removesuffix(form.suffix) for form in COMPRESSIONS if name.endswith(form.suffix)), name)
