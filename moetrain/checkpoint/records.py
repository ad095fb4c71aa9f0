"""Records of a checkpoint's manifest: files, tensors, chunks, and tables of experts.

This file writes them as JSON; manifest.py reads and checks them. It imports no torch.
"""

import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

from moetrain.checkpoint.tensor_names import current_name

VERSION = 2
BLOCK = 64 << 20  # bytes under one checksum
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
              "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_EXPERT = re.compile(r"(.+\.experts\.)(0|[1-9][0-9]{0,6})(\..+)")


class PayloadFile(NamedTuple):
    """A payload file."""

    size: int    # bytes
    header: int  # bytes of its header, with the 8 bytes that give the header's length
    crc: int     # CRC-32 of the header


class Chunk(NamedTuple):
    """Rows [first, first + rows) of a tensor, stored from byte `begin` of a file on."""

    file: str
    begin: int
    first: int
    rows: int
    crcs: tuple[int, ...]  # CRC-32 of every block of bytes


class TensorEntry(NamedTuple):
    """A tensor and its chunks in the order of their rows; a tensor without elements has none."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


class ExpertTable(NamedTuple):
    """One matrix of every expert of a layer; the row of an expert is [file, begin, crc, ...]."""

    dtype: str
    shape: tuple[int, ...]
    rows: list[list[int]]


class ByteRange(NamedTuple):
    """A range of bytes in a file: its key there, and the shape of its rows."""

    begin: int
    length: int
    key: str
    dtype: str
    shape: tuple[int, ...]
    crcs: tuple[int, ...]


@dataclass
class Manifest:
    """Content of a checkpoint.

    Args:
        facts: how the checkpoint was made: config, data, versions, mesh.
        values: state that is no tensor, with at least step and tokens.
        files: payload files by name.
        tensors: tensors by the name that they are stored under, except those in `experts`.
        experts: matrices of experts, by tensor name with * for the expert.
        block: bytes under one checksum.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    files: dict[str, PayloadFile] = field(default_factory=dict)
    tensors: dict[str, TensorEntry] = field(default_factory=dict)
    experts: dict[str, ExpertTable] = field(default_factory=dict)
    block: int = BLOCK

    @cached_property
    def stored_names(self) -> dict[str, str]:
        """Name that each tensor of `tensors` is stored under, by its name today (tensor_names.py).

        To be read when all tensors are in.
        """
        naming = self.facts.get("names", 1)
        return {current_name(stored, naming): stored for stored in self.tensors}

    def names(self) -> Iterator[str]:
        """Names of all tensors today, in an order that every reader of the manifest shares."""
        yield from self.stored_names
        for pattern, table in self.experts.items():
            before, _, after = pattern.partition("*")
            yield from (f"{before}{expert}{after}" for expert in range(len(table.rows)))

    def entry(self, name: str) -> TensorEntry | None:
        """Record of a tensor, by its name today; None where the checkpoint has none of that name."""
        if name in self.stored_names:
            return self.tensors[self.stored_names[name]]
        found = split_expert(name)
        table = self.experts.get(found[0]) if found else None
        if found is None or table is None or found[1] >= len(table.rows):
            return None
        file, begin, *crcs = table.rows[found[1]]
        chunk = Chunk(list(self.files)[file], begin, 0, row_count(table.shape), tuple(crcs))
        return TensorEntry(table.dtype, table.shape, (chunk,))

    def parts(self) -> dict[str, list[ByteRange]]:
        """Content of every file, in the order of its bytes."""
        names = list(self.files)
        found: dict[str, list[ByteRange]] = {name: [] for name in names}
        for name, entry in self.tensors.items():
            for chunk in entry.chunks:
                shape, whole = (chunk.rows, *entry.shape[1:]), chunk.rows == row_count(entry.shape)
                key = name if whole else f"{name}@{chunk.first}"
                found[chunk.file].append(ByteRange(
                    chunk.begin, chunk.rows * row_bytes(entry), key, entry.dtype,
                    entry.shape if whole else shape, chunk.crcs))
        for pattern, table in self.experts.items():
            before, _, after = pattern.partition("*")
            length = row_count(table.shape) * row_bytes(table)
            for expert, (file, begin, *crcs) in enumerate(table.rows):
                found[names[file]].append(ByteRange(
                    begin, length, f"{before}{expert}{after}", table.dtype, table.shape, tuple(crcs)))
        for parts in found.values():
            parts.sort()
        return found

    def encode(self) -> bytes:
        """Content of the manifest's file."""
        place = {name: number for number, name in enumerate(self.files)}
        tensors = {name: [entry.dtype, entry.shape,
                          [[place[chunk.file], chunk.begin, chunk.first, chunk.rows, *chunk.crcs]
                           for chunk in entry.chunks]]
                   for name, entry in self.tensors.items()}
        return with_checksum({
            "version": VERSION, "facts": self.facts, "values": self.values, "block": self.block,
            "files": self.files, "tensors": tensors, "experts": self.experts})


def row_count(shape: tuple[int, ...]) -> int:
    """Number of rows of a tensor: its size in dim 0, and 1 for a scalar."""
    return shape[0] if shape else 1


def row_bytes(of: TensorEntry | ExpertTable) -> int:
    """Bytes of one row of a tensor."""
    return prod(of.shape[1:]) * ITEM_BYTES[of.dtype]


def split_expert(name: str) -> tuple[str, int] | None:
    """Split the name of an expert's tensor into (name with * for the expert, expert); None for others."""
    found = _EXPERT.fullmatch(name)
    return (f"{found[1]}*{found[3]}", int(found[2])) if found else None


def with_checksum(record: dict[str, Any]) -> bytes:
    """Encode a record as JSON below a line with its CRC-32; `read_checked` reads it."""
    body = json.dumps(record, allow_nan=False, separators=(",", ":")).encode()
    return b"%08x\n%b" % (zlib.crc32(body), body)
