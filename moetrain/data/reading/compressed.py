"""Files as streams of bytes, decompressed by content: gzip, Zstandard, xz and bzip2, whatever the name.

A stream is read block by block, so memory does not grow with the unpacked size: a file of a few kilobytes may
unpack to gigabytes. Several members or frames in a row are one stream. A damaged or truncated file is an
error that names the place, never an early end.
"""

import bz2
import gzip
import io
import lzma
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any, BinaryIO, NamedTuple

from moetrain.errors import DataError
from moetrain.files import open_regular, reason

_CHUNK = 1 << 16                    # bytes of a compressed file read at once
_XZ_MEMORY = 1 << 30                # bytes of memory an xz file may ask for; the largest preset takes 65 MiB


class Compression(NamedTuple):
    """A compression format.

    Args:
        name: the format.
        magic: bytes that such a file begins with.
        suffix: of file names.
        unpack: command that unpacks a file.
        open: takes a binary file of compressed bytes and returns one of the content.
    """

    name: str
    magic: bytes
    suffix: str
    unpack: str
    open: Callable[[Any], Any]


class _Members(io.RawIOBase):
    """Content of compressed streams that follow each other in one file.

    The modules bz2 and lzma ignore bytes behind a stream that start no other; here they are damage.

    Args:
        file: the compressed bytes.
        decoder: makes the decompressor of one stream.
        padding: whether NUL bytes may follow a stream, as the xz format allows.
    """

    def __init__(self, file: BinaryIO, decoder: Callable[[], Any], *, padding: bool = False) -> None:
        self._file, self._new, self._padding = file, decoder, padding
        self._decoder = decoder()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._next(len(buffer))
        buffer[:len(content)] = content
        return len(content)

    def _next(self, most: int) -> bytes:
        content = b""
        while not content:
            given = b""
            if self._decoder.eof:
                given = self._behind(self._decoder.unused_data)
                if not given:
                    break
                self._decoder = self._new()
            elif self._decoder.needs_input and not (given := self._file.read(_CHUNK)):
                raise EOFError("the file ends before its stream does")
            content = self._decoder.decompress(given, most)
        return content

    def _behind(self, given: bytes) -> bytes:
        """The beginning of the next stream; empty if there is none."""
        while True:
            given = given.lstrip(b"\0") if self._padding else given
            if given or not (given := self._file.read(_CHUNK)):
                return given


def _buffered(decoder: Callable[[], Any], padding: bool, file: BinaryIO) -> io.BufferedReader:
    return io.BufferedReader(_Members(file, decoder, padding=padding), _CHUNK)


def _open_zstd(file: Any) -> Any:
    # The interface of Python 3.14's own module. The package zstandard accepts a truncated frame as whole.
    if sys.version_info >= (3, 14):
        from compression.zstd import ZstdFile
    else:
        from backports.zstd import ZstdFile
    return ZstdFile(file)


COMPRESSIONS = (
    Compression("gzip", b"\x1f\x8b", ".gz", "gzip -d", lambda file: gzip.GzipFile(fileobj=file)),
    # --long=31: windows of up to 2 GiB
    Compression("Zstandard", b"\x28\xb5\x2f\xfd", ".zst", "zstd -d --long=31", _open_zstd),
    Compression("xz", b"\xfd7zXZ\0", ".xz", "xz -d",
                partial(_buffered, partial(lzma.LZMADecompressor, lzma.FORMAT_XZ, _XZ_MEMORY), True)),
    # The digit is the block size; after it a block begins, or an empty stream ends.
    *(Compression("bzip2", b"BZh%d" % digit + begin, ".bz2", "bzip2 -d",
                  partial(_buffered, bz2.BZ2Decompressor, False))
      for digit in range(1, 10) for begin in (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90")),
)
_LONGEST_MAGIC = max(len(form.magic) for form in COMPRESSIONS)


class ByteStream:
    """Bytes of a file from its start, decompressed; a context manager.

    `compression` is the format that the content shows, None if the file is not compressed.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._read, self._ahead = path, 0, b""
        self._file = open_regular(path)
        head = self._file.read(_LONGEST_MAGIC)
        self._file.seek(0)
        self.compression = next((form for form in COMPRESSIONS if head.startswith(form.magic)), None)
        self._content = self.compression.open(self._file) if self.compression else self._file

    def read(self, size: int) -> bytes:
        """Read `size` bytes, fewer only at the end."""
        if not self._ahead:
            return self._next(size)
        content, self._ahead = self._ahead[:size], self._ahead[size:]
        return content if len(content) == size else content + self._next(size - len(content))

    def peek(self, size: int) -> bytes:
        """The next `size` bytes, fewer only at the end, without consuming them."""
        if len(self._ahead) < size:
            self._ahead += self._next(size - len(self._ahead))
        return self._ahead[:size]

    @property
    def file(self) -> BinaryIO:
        """The file as it is on disk."""
        return self._file

    @property
    def position(self) -> int:
        """Bytes of the file read so far, ahead of the content by a buffer: a measure of progress."""
        return self._file.tell()

    def _next(self, size: int) -> bytes:
        try:
            content = self._content.read(size)
        except Exception as error:
            # EOFError, BadGzipFile, zlib.error, LZMAError, ZstdError. An OSError of the system has an errno.
            if self.compression is None or getattr(error, "errno", None) is not None:
                raise
            raise self._damaged(self.compression, error) from error
        self._read += len(content)
        return content

    def _damaged(self, compression: Compression, error: Exception) -> DataError:
        return DataError(102, "a compressed file cannot be read to its end",
                         where=f"{self.path}, byte {self.position:,} or before, after {self._read:,} bytes "
                               "of text",
                         why=f"{compression.name}: {reason(error)}",
                         next=f"copy the file again, or unpack it by {compression.unpack} "
                              f"{quote(str(self.path))}")

    def __enter__(self) -> "ByteStream":
        return self

    def __exit__(self, *exception: object) -> None:
        self._content.close()
        self._file.close()


def inner_name(name: str) -> str:
    """A file name without the suffix of a compression."""
    return next((name.removesuffix(form.suffix) for form in COMPRESSIONS if name.endswith(form.suffix)), name)
