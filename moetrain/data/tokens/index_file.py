"""On-disk format of the index of a token file.

    8 bytes     magic  b"MOEINDEX"
    4+4+4       version, length of the header, CRC-32 of the header (little-endian)
    header      JSON: key (what was read, and how), stamps (of the files that were read), format, start,
                dtype, blocks, documents, ending, CRC-32 of the rest
    checksums   uint32 [blocks], CRC-32 of every block of the token file
    starts      int64 [documents + 1], first token of every document, and the end

An index only saves time. Any fault in it raises ValueError or OSError, and the token file is read again.
"""

import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moetrain.data.tokens.index import Ending, TokenIndex
from moetrain.data.tokens.shards import BLOCK, write_file
from moetrain.files import open_regular, parse_json

MAGIC = b"MOEINDEX"
SUFFIX = ".index"
_VERSION = 1
_PREFIX = struct.Struct("<8sIII")
_MOST_HEADER = 1 << 20
# A list instead of a set: the header of a damaged file may hold an unhashable value.
_DTYPES = [f"{order}{kind}{size}" for order in "<>" for kind in "iu" for size in (2, 4, 8)] + ["|i1", "|u1"]
_COUNTS = ("start", "blocks", "documents", "crc")

Stamp = list[int]                            # state of a file: size, mtime and ctime in ns


class StoredIndex(NamedTuple):
    """Content of an index file.

    Args:
        key: which token file was read, and how.
        stamps: state of the files that were read, at that time.
        index: the result.
    """

    key: list[Any]
    stamps: list[Stamp]
    index: TokenIndex


def write_index(path: Path, kept: StoredIndex) -> None:
    """Write an index file, whole or not at all. DiskError if it cannot be written."""
    index = kept.index
    arrays = np.array(index.checksums, "<u4").tobytes() + np.ascontiguousarray(index.starts, "<i8").tobytes()
    header = json.dumps({
        "key": kept.key, "stamps": kept.stamps, "format": index.format, "start": index.start,
        "dtype": index.dtype.str, "blocks": len(index.checksums), "documents": index.documents,
        "ending": index.ending, "crc": zlib.crc32(arrays)}).encode()
    write_file(path, _PREFIX.pack(MAGIC, _VERSION, len(header), zlib.crc32(header)), header, arrays)


def read_index(path: Path) -> StoredIndex:
    """Read an index file. OSError if it cannot be read, ValueError if it is damaged."""
    with open_regular(path, links=False) as file:
        size, prefix = os.fstat(file.fileno()).st_size, file.read(_PREFIX.size)
        if len(prefix) < _PREFIX.size:
            raise ValueError(f"it has {size:,} bytes")
        magic, version, length, crc = _PREFIX.unpack(prefix)
        if (magic, version) != (MAGIC, _VERSION) or length > _MOST_HEADER:
            raise ValueError(f"it starts with {prefix[:12]!r}")
        raw = file.read(length)
        if zlib.crc32(raw) != crc:
            raise ValueError("the checksum of its header does not match")
        header = _checked(parse_json(raw))
        blocks, documents = header["blocks"], header["documents"]
        expected = _PREFIX.size + length + 4 * blocks + 8 * (documents + 1)
        if size != expected:
            raise ValueError(f"{size:,} bytes instead of {expected:,}")
        arrays = file.read(4 * blocks + 8 * (documents + 1))
    if zlib.crc32(arrays) != header["crc"]:
        raise ValueError("the checksum of its content does not match")
    starts = np.frombuffer(arrays, "<i8", documents + 1, 4 * blocks)
    if starts[0] != 0 or (np.diff(starts) < 0).any() or -(-int(starts[-1]) // BLOCK) != blocks:
        raise ValueError("its documents do not cover its blocks")
    ending = header["ending"] and Ending(*header["ending"])
    index = TokenIndex(header["format"], header["start"], np.dtype(header["dtype"]),
                       np.frombuffer(arrays, "<u4", blocks).tolist(), starts, ending)
    return StoredIndex(header["key"], header["stamps"], index)


def _checked(header: Any) -> dict[str, Any]:
    """The header, after a check that its values have the types that the reader relies on."""
    if (not isinstance(header, dict)
            or any(type(header.get(name)) is not int or header[name] < 0 for name in _COUNTS)):
        raise ValueError("a count is missing from its header")
    stamps, ending = header.get("stamps"), header.get("ending")
    if (not isinstance(header.get("key"), list) or not isinstance(header.get("format"), str)
            or not _are_integers(stamps)):
        raise ValueError("its header does not say of what it is")
    if header.get("dtype") not in _DTYPES:
        raise ValueError(f"its type of ids is {header.get('dtype')!r}")
    if (ending is not None
            and not (isinstance(ending, list) and [type(value) for value in ending] == [int, float, int])):
        raise ValueError("what documents end in is none")
    return header


def _are_integers(stamps: Any) -> bool:
    return (isinstance(stamps, list)
            and all(isinstance(stamp, list) and list(map(type, stamp)) == [int] * 3 for stamp in stamps))
