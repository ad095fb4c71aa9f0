"""Payload files of a checkpoint: safetensors for other tools, with checksums in the manifest.

    8 bytes     length of the header, little-endian
    header      JSON {"__metadata__": {...}, key: {"dtype", "shape", "data_offsets"}}, padded with spaces
                to 8 bytes
    content     the tensors, one after the other

A key is the tensor's name, or `name@<first row>` where the file holds only some of its rows. The
header is for other tools. Reading relies on the manifest alone, from which every byte of the header
follows: the header is compared, never parsed. It includes step and rank, so that files of two steps
differ. This file imports no torch.
"""

import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from moetrain.checkpoint.disk import new_file
from moetrain.checkpoint.manifest import damaged
from moetrain.checkpoint.records import BLOCK, ITEM_BYTES, ByteRange, PayloadFile, row_count
from moetrain.errors import CheckpointError
from moetrain.files import open_descriptor, reason


class TensorRows(NamedTuple):
    """Rows [first, first + rows) of a tensor, as bytes in memory; `shape` is the whole tensor's."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    first: int
    rows: int
    content: memoryview


def write_payload(path: Path, items: list[TensorRows], step: int,
                  block: int = BLOCK) -> tuple[PayloadFile, list[list[Any]]]:
    """Write tensors one after the other, those with the largest elements first, so that all lie aligned.

    Args:
        path: the file, which must not exist.
        items: what to write.
        step: step of the checkpoint.
        block: bytes under one checksum.

    Returns:
        The record of the file, and for each item a row
        [name, dtype, shape, begin, first row, rows, crc, ...].
    """
    items = sorted(items, key=lambda item: (-ITEM_BYTES[item.dtype], item.name, item.first))
    head = header(map(_part, items), metadata(path.name, step))
    rows, begin = [], len(head)
    with new_file(path) as append:
        append(head)
        for item in items:
            crcs = []
            for start in range(0, len(item.content), block):
                piece = item.content[start:start + block]
                crcs.append(zlib.crc32(piece))
                append(piece)
            rows.append([item.name, item.dtype, item.shape, begin, item.first, item.rows, *crcs])
            begin += len(item.content)
    return PayloadFile(begin, len(head), zlib.crc32(head)), rows


def _part(item: TensorRows) -> ByteRange:
    whole = item.rows == row_count(item.shape)
    return ByteRange(0, len(item.content), item.name if whole else f"{item.name}@{item.first}", item.dtype,
                     item.shape if whole else (item.rows, *item.shape[1:]), ())


def header(parts: Iterable[ByteRange], metadata: dict[str, str]) -> bytes:
    """Encode the header of a payload file, including its length."""
    record: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for part in parts:
        record[part.key] = {"dtype": part.dtype, "shape": part.shape,
                            "data_offsets": [offset, offset + part.length]}
        offset += part.length
    text = json.dumps(record, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def payload_name(rank: int) -> str:
    """Name of the payload file of a rank."""
    return f"rank-{rank:04d}.safetensors"


def metadata(name: str, step: int) -> dict[str, str]:
    """Entry `__metadata__` of the header."""
    return {"format": "pt", "step": str(step), "file": name}


class Payload:
    """Payload file open for reading. Any difference from the manifest raises CheckpointError.

    Args:
        path: the file.
        file: its record in the manifest.
    """

    def __init__(self, path: Path, file: PayloadFile) -> None:
        self.path, self.file = path, file
        try:
            self.descriptor = open_descriptor(path, os.O_RDONLY, links=False)
        except FileNotFoundError:
            raise damaged(path, "the file is missing") from None
        except OSError as error:
            raise damaged(path, f"it cannot be opened: {reason(error)}") from error
        size = os.fstat(self.descriptor).st_size
        if size != file.size:
            self.close()
            raise damaged(path, f"{size} bytes long, {file.size} when it was written")

    def close(self) -> None:
        """Close the file."""
        os.close(self.descriptor)

    def __enter__(self) -> "Payload":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check_header(self) -> bytearray:
        """Compare the header with its checksum; returns its bytes."""
        head = self._read(0, self.file.header)
        if zlib.crc32(head) != self.file.crc:
            raise damaged(
                self.path, "its header does not match its checksum: it is altered, or of another step")
        return head

    def check_keys(self, parts: list[ByteRange], step: int) -> None:
        """Check that the header lists exactly the tensors of the manifest."""
        if self.check_header() != header(parts, metadata(self.path.name, step)):
            raise damaged(self.path, "its header does not list the tensors of the manifest")

    def blocks(self, part: ByteRange, block: int, begin: int, end: int,
               check: bool = True) -> Iterator[memoryview]:
        """Read bytes [begin, end) of a part, block by block.

        Args:
            part: a range of bytes in this file.
            block: bytes under one checksum.
            begin: first byte, from the beginning of the part.
            end: end of the bytes, from the beginning of the part.
            check: read every block that they touch whole and compare it with its
                checksum, instead of these bytes alone.
        """
        for number in range(begin // block, -(-end // block)):
            start, stop = number * block, min((number + 1) * block, part.length)
            if not check:
                start, stop = max(start, begin), min(stop, end)
            content = self._read(part.begin + start, stop - start)
            if check and zlib.crc32(content) != part.crcs[number]:
                raise self._altered(part, start, stop)
            yield memoryview(content)[max(0, begin - start):min(end, stop) - start]

    def fill(self, part: ByteRange, block: int, into: memoryview) -> None:
        """Read a whole part into memory, and compare every block with its checksum.

        Args:
            part: a range of bytes in this file.
            block: bytes under one checksum.
            into: as many bytes.
        """
        for number, start in enumerate(range(0, part.length, block)):
            view = into[start:start + block]
            self._read_into(part.begin + start, view)
            if zlib.crc32(view) != part.crcs[number]:
                raise self._altered(part, start, start + len(view))

    def _altered(self, part: ByteRange, start: int, stop: int) -> CheckpointError:
        place = f"bytes {part.begin + start} to {part.begin + stop}"
        return damaged(self.path, f"{part.key} ({place}) does not match its checksum")

    def _read(self, begin: int, length: int) -> bytearray:
        content = bytearray(length)
        self._read_into(begin, memoryview(content))
        return content

    def _read_into(self, begin: int, view: memoryview) -> None:
        length, got = len(view), 0
        while got < length:
            try:
                count = os.preadv(self.descriptor, [view[got:]], begin + got)
            except OSError as error:
                raise damaged(self.path, f"it cannot be read: {error.strerror or error}") from error
            if not count:
                raise damaged(self.path, f"it ends at byte {begin + got}")
            got += count
