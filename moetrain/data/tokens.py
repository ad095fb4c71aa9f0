"""Token shards: memory-mapped files of token ids, each checked before it is believed.

    8 bytes   magic  b"MOETOKEN"
    4+4+4     version, length of the header, crc32 of the header (little-endian)
    header    JSON, padded with spaces: dtype, tokens, documents, vocab_size, domains, text_bytes, crc32 of the index,
              crc32 of every block of BLOCK tokens
    index     int64 offsets of the documents [documents + 1], int32 domain of each document
    tokens    uint16 when the vocabulary has at most 65,536 ids, else uint32

A header is treated as hostile: every length is compared with the file before anything is allocated.

Errors of the room `data/` (exit code 12):

    E-DATA-001 cannot be read         010 dataset folder incomplete    030 no such path         040 corpus too small
    E-DATA-002 empty                  011 dataset.json damaged         031 binary file          050 seq_len too long
    E-DATA-003 not a token shard      012 shard of another dataset     032 nothing to read      051 text not prepared
    E-DATA-004 unknown version        013 documents out of order       033 bad line of .jsonl   052 data.path missing
    E-DATA-005 header damaged         020 no such tokenizer            034 changed while read
    E-DATA-006 truncated or longer    021 bad tokenizer file           035 too little text to split
    E-DATA-007 altered
    E-DATA-008 token id out of range                          070 … 074 indexed datasets (interop/megatron.py)
"""

import json
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from moetrain.errors import DataError, DiskError

MAGIC = b"MOETOKEN"
VERSION = 1
BLOCK = 1 << 20                      # tokens under one checksum
_PREFIX = struct.Struct("<8sIII")    # magic, version, header length, header crc32
_MAX_HEADER = 16 << 20
_MAX_COUNT = 1 << 48
_DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


@dataclass(frozen=True)
class TokenShard:
    """One shard, open for reading; `tokens` stays on disk until it is touched."""

    path: Path
    vocab_size: int
    domains: tuple[str, ...]
    text_bytes: int
    header_crc: int                  # identifies the content: the header holds the checksums of everything else
    offsets: np.ndarray              # int64 [documents + 1], in tokens
    document_domains: np.ndarray     # int32 [documents]
    tokens: np.ndarray

    @property
    def documents(self) -> int:
        return len(self.document_domains)


def write_shard(path: Path, *, documents: Sequence[np.ndarray], document_domains: Sequence[int], vocab_size: int,
                domains: Sequence[str], text_bytes: int) -> None:
    """Write one shard under a temporary name and rename it; an existing file is never replaced."""
    if path.exists():
        raise DiskError(11, "a token shard is already there", where=str(path), why="shards are never overwritten",
                        next="remove it, or choose another folder (data.cache)")
    dtype = _DTYPES["uint16" if vocab_size <= 1 << 16 else "uint32"]
    tokens = np.concatenate([np.zeros(0, dtype), *documents]).astype(dtype)
    offsets = np.concatenate([[0], np.cumsum([len(document) for document in documents])]).astype("<i8")
    index = offsets.tobytes() + np.asarray(document_domains, "<i4").tobytes()
    blocks = [zlib.crc32(tokens[start:start + BLOCK]) for start in range(0, len(tokens), BLOCK)]
    header = json.dumps({
        "dtype": dtype.name, "tokens": len(tokens), "documents": len(documents), "vocab_size": vocab_size,
        "domains": list(domains), "text_bytes": text_bytes, "index_crc": zlib.crc32(index), "block_crc": blocks,
    }).encode()
    header += b" " * (-(len(header) + _PREFIX.size) % 64)        # the index starts aligned
    prefix = _PREFIX.pack(MAGIC, VERSION, len(header), zlib.crc32(header))
    write_file(path, prefix, header, index, memoryview(tokens).cast("B"))


def write_file(path: Path, *pieces: bytes | memoryview) -> None:
    """The pieces in a file that appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> DiskError:
    return DiskError(10, "prepared tokens cannot be written", where=str(path), why=error.strerror or str(error),
                     next="free some space, or choose another folder: data.cache=<folder>")


def open_shard(path: Path, *, verify: bool) -> TokenShard:
    """The shard at `path`. Header and index are always checked; with `verify` every token is, too."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            header, header_crc = _read_header(path, file, size)
            start = file.tell()
            offsets, document_domains = _read_index(path, file, size, header)
        shape = (header["tokens"],)
        dtype = _DTYPES[header["dtype"]]
        start += 8 * len(offsets) + 4 * len(document_domains)
        tokens = np.memmap(path, dtype, "r", start, shape) if shape[0] else np.zeros(0, dtype)
    except OSError as error:
        raise DataError(1, "a token shard cannot be read", where=str(path), why=error.strerror or str(error),
                        next="check data.path, or prepare the text again with data=text") from error
    if verify:
        _verify_tokens(path, header, offsets, tokens, start)
    return TokenShard(path, header["vocab_size"], tuple(header["domains"]), header["text_bytes"], header_crc,
                      offsets, document_domains, tokens)


def damaged(number: int, path: Path, what: str, offset: int, why: str) -> NoReturn:
    raise DataError(number, what, where=f"{path}, byte {offset:,}", why=why,
                    next="remove the folder and prepare the text again with data=text, or restore the file from a copy")


def _read_header(path: Path, file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    if size == 0:
        damaged(2, path, "a token shard is empty", 0, "the file has no bytes")
    prefix = file.read(_PREFIX.size)
    if not prefix.startswith(MAGIC[:len(prefix)]):
        damaged(3, path, "not a token shard", 0, f"the file starts with {prefix[:8]!r}, not with {MAGIC!r}")
    if len(prefix) < _PREFIX.size:
        damaged(6, path, "a token shard is truncated", size, f"its start alone has {_PREFIX.size} bytes")
    _, version, length, crc = _PREFIX.unpack(prefix)
    if version != VERSION:
        damaged(4, path, "a token shard has an unknown version", 8, f"version {version}; this moetrain reads {VERSION}")
    if length > _MAX_HEADER:
        damaged(5, path, "the header of a token shard is damaged", 12, f"it claims {length:,} bytes")
    if _PREFIX.size + length > size:
        damaged(6, path, "a token shard is truncated", size, f"the header alone ends at byte {_PREFIX.size + length:,}")
    raw = file.read(length)
    if zlib.crc32(raw) != crc:
        damaged(5, path, "the header of a token shard is damaged", _PREFIX.size, "its checksum does not match")
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        damaged(5, path, "the header of a token shard is damaged", _PREFIX.size, f"it is not JSON: {error}")
    problem = _header_problem(header)
    if problem:
        damaged(5, path, "the header of a token shard is damaged", _PREFIX.size, problem)
    return header, crc


def _header_problem(header: Any) -> str | None:
    """What makes a header unusable, in words; None when nothing does."""
    if not isinstance(header, dict):
        return "it is not a mapping"
    counts = ("tokens", "documents", "vocab_size", "text_bytes", "index_crc")
    wrong = [name for name in counts if type(header.get(name)) is not int or not 0 <= header[name] < _MAX_COUNT]
    if wrong:
        return f"{wrong[0]} is {header.get(wrong[0])!r}"
    if header.get("dtype") not in _DTYPES:
        return f"dtype is {header.get('dtype')!r}"
    domains, blocks = header.get("domains"), header.get("block_crc")
    if not isinstance(domains, list) or not all(isinstance(name, str) for name in domains):
        return "domains is not a list of names"
    if not isinstance(blocks, list) or not all(type(crc) is int for crc in blocks):
        return "block_crc is not a list of integers"
    if len(blocks) != -(-header["tokens"] // BLOCK):
        return f"{len(blocks)} checksums for {header['tokens']:,} tokens"
    return None


def _read_index(path: Path, file: BinaryIO, size: int, header: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    start, documents, tokens = file.tell(), header["documents"], header["tokens"]
    length = 8 * (documents + 1) + 4 * documents
    expected = start + length + tokens * _DTYPES[header["dtype"]].itemsize
    if size != expected:
        state = "truncated" if size < expected else "longer than its header says"
        damaged(6, path, f"a token shard is {state}", min(size, expected), f"{size:,} bytes instead of {expected:,}")
    raw = file.read(length)
    if zlib.crc32(raw) != header["index_crc"]:
        damaged(7, path, "a token shard was altered", start, "the checksum of the document index does not match")
    offsets = np.frombuffer(raw, "<i8", documents + 1)
    document_domains = np.frombuffer(raw, "<i4", documents, 8 * (documents + 1))
    if offsets[0] != 0 or offsets[-1] != tokens or (np.diff(offsets) < 0).any():
        damaged(5, path, "the index of a token shard is damaged", start, "its offsets do not cover the tokens")
    if documents and not 0 <= document_domains.min() <= document_domains.max() < len(header["domains"]):
        damaged(5, path, "the index of a token shard is damaged", start, "it names a domain that is not listed")
    return offsets, document_domains


def _verify_tokens(path: Path, header: dict[str, Any], offsets: np.ndarray, tokens: np.ndarray, start: int) -> None:
    for block, crc in enumerate(header["block_crc"]):
        ids = tokens[block * BLOCK:(block + 1) * BLOCK]
        offset = start + block * BLOCK * tokens.itemsize
        if zlib.crc32(np.ascontiguousarray(ids)) != crc:
            damaged(7, path, "a token shard was altered", offset,
                    f"the checksum of block {block} ({ids.nbytes:,} bytes from here on) does not match")
        if int(ids.max()) >= header["vocab_size"]:
            first = block * BLOCK + int(np.argmax(ids >= header["vocab_size"]))
            _refuse_id(path, header["vocab_size"], offsets, tokens, first)


def _refuse_id(path: Path, vocab_size: int, offsets: np.ndarray, tokens: np.ndarray, position: int) -> NoReturn:
    document = int(np.searchsorted(offsets, position, "right")) - 1
    raise DataError(8, "a token id is outside the vocabulary",
                    where=f"{path}, document {document}, token {position - int(offsets[document])}",
                    why=f"id {int(tokens[position])} with vocab_size={vocab_size}",
                    next="prepare the text again with the tokenizer of the model (data.tokenizer)")
