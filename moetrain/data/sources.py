"""Files and folders to documents.

A document is a text file, or a line of a `.jsonl` file ({"text": ..., "domain": ...}). Its domain is what the line
says, else the first folder below the path given, else the suffix without the dot (`text` when there is none). Files
compressed by gzip or Zstandard are read as what they hold; `.gz` and `.zst` do not count as suffixes.

What happens to odd input: hidden files are left out; links are followed, each folder once; a byte order mark is
dropped; CRLF and undecodable bytes are kept as they are; empty texts are left out. A file with NUL bytes, or of which
more than a tenth is not UTF-8, is binary: refused when it is what the user named, left out with one warning when it
lies in a folder. A line of a `.jsonl` file that is not such an object is refused.

Every text is read twice: for its digest, and to be tokenised once it is known which side it is on. Both times a block at a
time, so a document may be larger than memory. Between the two a `Spool` keeps what is not read from its file again: lines,
which would have to be parsed again, and texts of compressed files, in which no place can be looked up.
"""

import codecs
import hashlib
import json
import logging
import os
import stat
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from moetrain.data.compressed import ByteStream, inner_name
from moetrain.data.spool import Spool
from moetrain.data.text import BLOCK, MOST_UNDECODABLE, TextCheck, binary_byte, blocks_of, cut
from moetrain.errors import DataError
from moetrain.files import open_regular, reason

log = logging.getLogger(__name__)

LONGEST_LINE = 256 << 20            # bytes of a line of a .jsonl file: a line is parsed as a whole


class SourceFile(NamedTuple):
    path: Path
    name: str                       # relative to the path the user gave
    size: int
    mtime_ns: int


class Document(NamedTuple):
    """A text that stays on disk; `blocks` gives it again, as `data.text.blocks_of` does, or raises if it changed."""

    domain: str
    digest: bytes                   # sha256 of the text
    size: int                       # bytes
    blocks: Callable[[], Iterator[bytes]]


def scan(path: Path, *, exclude: tuple[Path, ...] = (), key: str = "data.path") -> list[SourceFile]:
    """The regular files at or below `path`, sorted by name.

    exclude: files and folders below it to stay out of, such as our own output. key: the key that named the path.
    """
    try:
        found = path.stat()
        if not stat.S_ISDIR(found.st_mode):
            return [SourceFile(path, path.name, found.st_size, found.st_mtime_ns)]
        skip = {_identity(place.stat()) for place in exclude if place.exists()} - {_identity(found)}
        return sorted(_walk(path.resolve(), skip), key=lambda file: file.name)
    except OSError as error:
        raise _unreadable(path, error, key) from error


def documents(files: list[SourceFile], *, spool: Spool, progress: Callable[[int, int], None] | None = None,
              key: str = "data.path") -> Iterator[Document]:
    """Every text of the files, duplicates included; binary files as the module says."""
    total, done = sum(file.size for file in files), 0
    binary: list[_BinaryError] = []
    for file in files:
        advance = partial(_advance, progress, done, file.size, total) if progress else None
        try:
            yield from _read(file, spool, advance)
        except _BinaryError as error:
            binary.append(error)
        except OSError as error:
            raise _unreadable(file.path, error, key) from error
        done += file.size
        if progress:
            progress(done, total)
    if binary and len(binary) == len(files):
        raise binary[0].refusal(key)
    if binary:
        log.warning("left out %d binary files, the first is %s (byte %d)", len(binary), binary[0].path, binary[0].offset)


def text_document(domain: str, text: bytes) -> Document:
    """A document that is already in memory."""
    return Document(domain, hashlib.sha256(text).digest(), len(text), partial(cut, text))


class _BinaryError(Exception):
    """A file is no text. offset: the byte that shows it."""

    def __init__(self, path: Path, offset: int) -> None:
        super().__init__(path, offset)
        self.path, self.offset = path, offset

    def refusal(self, key: str) -> DataError:
        return DataError(31, "the file is binary, not text", where=f"{self.path}, byte {self.offset:,}",
                         why=f"a NUL byte, or more than {MOST_UNDECODABLE:.0%} of the bytes are not UTF-8",
                         next=f"convert it to UTF-8 text, or give a folder of text: {key}=<folder>")


def _walk(root: Path, skip: set[tuple[int, int]]) -> Iterator[SourceFile]:
    visited: set[tuple[int, int]] = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        here = _identity(os.stat(folder))
        if here in visited or here in skip:
            folders.clear()
            continue
        visited.add(here)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            path = Path(folder, name)
            if name.startswith(".") or not path.exists():        # a link to nowhere
                continue
            found = path.stat()
            if stat.S_ISREG(found.st_mode) and found.st_size and _identity(found) not in skip:
                yield SourceFile(path, path.relative_to(root).as_posix(), found.st_size, found.st_mtime_ns)


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _advance(progress: Callable[[int, int], None], before: int, size: int, total: int, position: int) -> None:
    progress(before + min(position, size), total)


def _read(file: SourceFile, spool: Spool, advance: Callable[[int], None] | None) -> Iterator[Document]:
    """The documents of one file. advance: told how many bytes of it were read."""
    domain = _domain(inner_name(file.name))
    with ByteStream(file.path) as stream:
        if inner_name(file.name).endswith(".jsonl"):
            yield from _lines(file.path, domain, stream, spool, advance)
        elif document := _text(file.path, domain, stream, spool, advance):
            yield document


def _text(path: Path, domain: str, stream: ByteStream, spool: Spool, advance: Callable[[int], None] | None) -> Document | None:
    """The one document of a text file; None when it is empty."""
    digest, size, check, start = hashlib.sha256(), 0, TextCheck(), spool.size
    try:
        for block in _without_mark(blocks_of(stream.read)):
            digest.update(block)
            size += len(block)
            if (offset := check.add(block)) is not None:
                raise _BinaryError(path, offset)
            if stream.compression:
                spool.append(block)
            if advance:
                advance(stream.position)
        if (offset := check.end()) is not None:
            raise _BinaryError(path, offset)
    except _BinaryError:
        spool.cut(start)
        raise
    if not size:
        return None
    again = partial(spool.blocks, start, size) if stream.compression else partial(_file_again, path, digest.digest())
    return Document(domain, digest.digest(), size, again)


def _lines(path: Path, domain: str, stream: ByteStream, spool: Spool,
           advance: Callable[[int], None] | None) -> Iterator[Document]:
    """The documents of a file of JSON lines."""
    offset = number = position = 0
    while content := stream.line(LONGEST_LINE):
        if len(content) == LONGEST_LINE:
            raise DataError(103, "a line of a .jsonl file is too long", where=f"{path}, line {number + 1}, byte {offset:,}",
                            why=f"a line is parsed as a whole, and has {LONGEST_LINE:,} bytes at most",
                            next="give long texts as files of their own: a folder of .txt files")
        if not offset and (binary := binary_byte(content[:BLOCK])) is not None:
            raise _BinaryError(path, binary)
        for line in content.splitlines(keepends=True):           # a lone carriage return ends a line, too
            number += 1
            if line.removeprefix(codecs.BOM_UTF8).strip():
                text, own_domain = _parse(path, line, number, offset)
                if text:
                    again = partial(spool.blocks, spool.append(text), len(text))
                    yield Document(own_domain or domain, hashlib.sha256(text).digest(), len(text), again)
            offset += len(line)
        if advance and stream.position != position:
            position = stream.position
            advance(position)


def _parse(path: Path, line: bytes, number: int, offset: int) -> tuple[bytes, str]:
    """Text and domain of a line of a .jsonl file."""
    try:
        record = json.loads(line.removeprefix(codecs.BOM_UTF8))
        problem = None if isinstance(record, dict) else "the line is not an object"
    except (ValueError, RecursionError) as error:
        record, problem = {}, f"the line is not JSON: {error}"
    text, domain = (record.get("text"), record.get("domain", "")) if not problem else (None, "")
    if not problem and not isinstance(text, str):
        problem = 'the object has no string "text"'
    if not problem and not isinstance(domain, str):
        problem = '"domain" is not a string'
    if problem:
        raise DataError(33, "a line of a .jsonl file cannot be used", where=f"{path}, line {number}, byte {offset:,}",
                        why=problem, next='one object a line: {"text": "...", "domain": "..."}, domain optional')
    return text.encode("utf-8", "replace"), domain.encode("utf-8", "replace").decode()


def _file_again(path: Path, digest: bytes) -> Iterator[bytes]:
    found = hashlib.sha256()
    try:
        with open_regular(path) as file:
            for block in _without_mark(blocks_of(file.read)):
                found.update(block)
                yield block
    except OSError as error:
        raise _changed(path) from error
    if found.digest() != digest:
        raise _changed(path)


def _without_mark(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The blocks of a file without its byte order mark."""
    for number, block in enumerate(blocks):
        text = block if number else block.removeprefix(codecs.BOM_UTF8)
        if text:
            yield text


def _domain(name: str) -> str:
    folder, slash, _ = name.partition("/")
    domain = folder if slash else Path(name).suffix.removeprefix(".") or "text"
    return os.fsencode(domain).decode("utf-8", "backslashreplace")          # a name that is not UTF-8 has a readable one, too


def _unreadable(path: Path, error: OSError, key: str) -> DataError:
    otherwise = ", or data.path=null for the built-in corpus" if key == "data.path" else ""
    return DataError(30, "the text cannot be read", where=f"{path} ({key})", why=reason(error),
                     next=f"{key}=<file or folder of text>{otherwise}")


def _changed(path: Path) -> DataError:
    return DataError(34, "a text changed while it was read", where=str(path), why="its content is not what the first pass saw",
                     next="run again when nothing writes to the file")
