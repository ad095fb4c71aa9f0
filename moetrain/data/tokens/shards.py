"""Token shards: files of token ids with checksums over every part.

    8 bytes   magic  b"MOETOKEN"
    4+4+4     version, length of the header, crc32 of the header (little-endian)
    header    JSON, padded with spaces: dtype, tokens, documents, vocab_size, domains, text_bytes, crc32 of
              the index, crc32 of every block of BLOCK tokens
    index     int64 offsets of the documents [documents + 1], int32 domain of each document
    tokens    uint16 when the vocabulary has at most 65,536 ids, else uint32

A header is treated as hostile: every length is compared with the file before anything is allocated. A shard
is a regular file; a symbolic link, which may lead anywhere, is refused. `blocks.py` reads the tokens and
compares them with their checksums.

Error codes of `moetrain/data` (exit code 12):

    E-DATA-001 cannot be read         010 dataset folder incomplete    030 no such path
    E-DATA-002 empty                  011 dataset.json damaged         031 no text
    E-DATA-003 not a token shard      012 shard of another dataset     032 nothing to read
    E-DATA-004 unknown version        013 documents out of order       033 bad record of JSON
    E-DATA-005 header damaged         020 no such tokenizer            034 changed while read
    E-DATA-006 truncated or longer    021 bad tokenizer file           035 too little text to split
    E-DATA-007 altered                040 corpus too small             050 seq_len too long
    E-DATA-008 token id out of range  051 text not prepared            052 data.path missing

    102, 103, 130 … 137 readers of formats      150 … 156 tokenizers
    070 … 074, 122, 160 … 167 token files of other trainers
"""

import json
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from moetrain.data.tokens.blocks import Layout, ShardErrors, TokenBlocks, damaged
from moetrain.data.tokens.formats import how_to_read
from moetrain.errors import DataError, DiskError
from moetrain.files import create, open_regular, parse_json, reason, remedy

MAGIC = b"MOETOKEN"
VERSION = 1
BLOCK = 1 << 20                      # tokens under one checksum
_PREFIX = struct.Struct("<8sIII")    # magic, version, header length, header crc32
_MAX_HEADER = 16 << 20
_MAX_COUNT = 1 << 48
_DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


@dataclass(frozen=True)
class TokenShard:
    """One shard, open for reading. `tokens` stay on disk until they are read."""

    path: Path
    vocab_size: int
    domains: tuple[str, ...]
    text_bytes: int
    header_crc: int                  # identifies the content: the header holds all other checksums
    offsets: np.ndarray              # int64 [documents + 1], in tokens
    document_domains: np.ndarray     # int32 [documents]
    tokens: TokenBlocks

    @property
    def documents(self) -> int:
        return len(self.document_domains)


def token_dtype(vocab_size: int) -> np.dtype:
    """Type in which ids of a vocabulary are stored."""
    return _DTYPES["uint16" if vocab_size <= 1 << 16 else "uint32"]


def write_shard(path: Path, *, tokens: np.ndarray, offsets: Sequence[int], document_domains: Sequence[int],
                vocab_size: int, domains: Sequence[str], text_bytes: int) -> None:
    """Write one shard under a temporary name and rename it. An existing file is never replaced.

    Args:
        path: the file to write.
        tokens: [tokens], ids of all documents, of the type that `token_dtype` gives.
        offsets: first token of each document, then the number of tokens.
        document_domains: index into `domains` of each document.
        vocab_size: valid ids are 0 to vocab_size - 1.
        domains: names of the domains of the dataset.
        text_bytes: bytes of the text that the tokens encode.
    """
    if path.exists():
        raise DiskError(11, "a token shard is already there", where=str(path),
                        why="shards are never overwritten", next="choose another folder (data.cache)")
    dtype = token_dtype(vocab_size)
    assert tokens.dtype == dtype and offsets[-1] == len(tokens), (
        tokens.dtype, dtype, offsets[-1], len(tokens))
    index = np.asarray(offsets, "<i8").tobytes() + np.asarray(document_domains, "<i4").tobytes()
    blocks = [zlib.crc32(tokens[start:start + BLOCK]) for start in range(0, len(tokens), BLOCK)]
    header = json.dumps({
        "dtype": dtype.name, "tokens": len(tokens), "documents": len(document_domains),
        "vocab_size": vocab_size, "domains": list(domains), "text_bytes": text_bytes,
        "index_crc": zlib.crc32(index), "block_crc": blocks,
    }).encode()
    header += b" " * (-(len(header) + _PREFIX.size) % 64)        # the index starts aligned
    prefix = _PREFIX.pack(MAGIC, VERSION, len(header), zlib.crc32(header))
    write_file(path, prefix, header, index, memoryview(tokens).cast("B"))


def write_file(path: Path, *pieces: bytes | memoryview) -> None:
    """Write the pieces to a file that appears whole or not at all. DiskError if it cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with create(temporary) as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> DiskError:
    """The error for prepared data that cannot be written to `path`."""
    return DiskError(10, "prepared tokens cannot be written", where=str(path), why=reason(error),
                     next=f"{remedy(error)}, or choose another folder: data.cache=<folder>")


def open_shard(path: Path, *, verify: bool) -> TokenShard:
    """Open the shard at `path`.

    Header and index are checked now; tokens are checked now with `verify`, else when they are first read.
    """
    try:
        with open_regular(path, links=False) as file:
            found = os.fstat(file.fileno())
            header, header_crc = _read_header(path, file, found.st_size)
            offsets, document_domains = _read_index(path, file, found.st_size, header)
            start = file.tell()
    except OSError as error:
        raise ShardErrors().unreadable(path, error) from error
    layout = Layout(start, header["tokens"], _DTYPES[header["dtype"]], header["block_crc"], BLOCK,
                    header["vocab_size"])
    tokens = TokenBlocks(path, layout, offsets, found)
    if verify:
        tokens.verify()
    return TokenShard(path, header["vocab_size"], tuple(header["domains"]), header["text_bytes"], header_crc,
                      offsets, document_domains, tokens)


def _read_header(path: Path, file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    if size == 0:
        raise DataError(2, "a token shard is empty", where=f"{path}, byte 0", why="the file has no bytes",
                        next="restore the file from a copy, or data.path=<the folder that data=text "
                             "prepared>")
    prefix = file.read(_PREFIX.size)
    if not prefix.startswith(MAGIC[:len(prefix)]):
        raise DataError(3, "not a token shard", where=f"{path}, byte 0",
                        why=f"it starts with {prefix[:8]!r}, not with {MAGIC!r}",
                        next=how_to_read(path) or "data.path=<the folder that data=text prepared>")
    if len(prefix) < _PREFIX.size:
        raise damaged(6, path, "a token shard is truncated", size,
                      f"its start alone has {_PREFIX.size} bytes")
    _, version, length, crc = _PREFIX.unpack(prefix)
    if version != VERSION:
        raise damaged(4, path, "a token shard has an unknown version", 8,
                      f"version {version}; this moetrain reads {VERSION}")
    if length > _MAX_HEADER:
        raise damaged(5, path, "the header of a token shard is damaged", 12, f"it claims {length:,} bytes")
    if _PREFIX.size + length > size:
        raise damaged(6, path, "a token shard is truncated", size,
                      f"the header alone ends at byte {_PREFIX.size + length:,}")
    raw = file.read(length)
    if zlib.crc32(raw) != crc:
        raise damaged(5, path, "the header of a token shard is damaged", _PREFIX.size,
                      "its checksum does not match")
    try:
        header = parse_json(raw)
    except ValueError as error:
        raise damaged(5, path, "the header of a token shard is damaged", _PREFIX.size,
                      f"it is not JSON: {reason(error)}") from error
    problem = _header_problem(header)
    if problem:
        raise damaged(5, path, "the header of a token shard is damaged", _PREFIX.size, problem)
    return header, crc


def _header_problem(header: Any) -> str | None:
    """What makes a header unusable, in words; None if nothing does."""
    if not isinstance(header, dict):
        return "it is not a mapping"
    counts = ("tokens", "documents", "vocab_size", "text_bytes", "index_crc")
    wrong = [name for name in counts if type(header.get(name)) is not int
             or not 0 <= header[name] < _MAX_COUNT]
    if wrong:
        return f"{wrong[0]} is {header.get(wrong[0])!r}"
    if header.get("dtype") not in list(_DTYPES):             # a list, not a set: the value may be unhashable
        return f"dtype is {header.get('dtype')!r}"
    domains, blocks = header.get("domains"), header.get("block_crc")
    if not isinstance(domains, list) or not all(isinstance(name, str) for name in domains):
        return "domains is not a list of names"
    if not isinstance(blocks, list) or not all(type(crc) is int for crc in blocks):
        return "block_crc is not a list of integers"
    if len(blocks) != -(-header["tokens"] // BLOCK):
        return f"{len(blocks)} checksums for {header['tokens']:,} tokens"
    return None


def _read_index(path: Path, file: BinaryIO, size: int,
                header: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    start, documents, tokens = file.tell(), header["documents"], header["tokens"]
    length = 8 * (documents + 1) + 4 * documents
    expected = start + length + tokens * _DTYPES[header["dtype"]].itemsize
    if size != expected:
        raise ShardErrors().truncated(path, size, expected)
    raw = file.read(length)
    if zlib.crc32(raw) != header["index_crc"]:
        raise ShardErrors().altered(path, start, "the checksum of the document index does not match")
    offsets = np.frombuffer(raw, "<i8", documents + 1)
    document_domains = np.frombuffer(raw, "<i4", documents, 8 * (documents + 1))
    if offsets[0] != 0 or offsets[-1] != tokens or (np.diff(offsets) < 0).any():
        raise damaged(5, path, "the index of a token shard is damaged", start,
                      "its offsets do not cover the tokens")
    if documents and not 0 <= document_domains.min() <= document_domains.max() < len(header["domains"]):
        raise damaged(5, path, "the index of a token shard is damaged", start,
                      "it names a domain that is not listed")
    return offsets, document_domains

