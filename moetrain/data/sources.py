"""Files and folders to documents.

A document is a text file, or a line of a `.jsonl` file ({"text": ..., "domain": ...}). Its domain is what the line
says, else the first folder below the path given, else the suffix without the dot (`text` when there is none).

What happens to odd input: hidden files are left out; links are followed, each folder once; a byte order mark is
dropped; CRLF and undecodable bytes are kept as they are; empty texts are left out. A file with NUL bytes, or of which
more than a tenth is not UTF-8, is binary: refused when it is what the user named, left out with one warning when it
lies in a folder. A line of a `.jsonl` file that is not such an object is refused.
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

from moetrain.errors import DataError

log = logging.getLogger(__name__)

BINARY_SHARE = 0.1


class SourceFile(NamedTuple):
    path: Path
    name: str                       # relative to the path the user gave
    size: int
    mtime_ns: int


class Document(NamedTuple):
    """A text that stays on disk; `read` gives it again, or raises if it changed."""

    domain: str
    digest: bytes                   # sha256 of the text
    size: int                       # bytes
    read: Callable[[], bytes]


def scan(path: Path, *, exclude: Path | None = None) -> list[SourceFile]:
    """The regular files at or below `path`, sorted by name. exclude: a folder to stay out of (our own output)."""
    try:
        found = path.stat()
        if not stat.S_ISDIR(found.st_mode):
            return [SourceFile(path, path.name, found.st_size, found.st_mtime_ns)]
        root = path.resolve()
        skip = exclude.resolve() if exclude else None
        return sorted(_walk(root, skip if skip != root else None), key=lambda file: file.name)
    except OSError as error:
        raise _unreadable(path, error) from error


def documents(files: list[SourceFile], *, progress: Callable[[int, int], None] | None = None) -> Iterator[Document]:
    """Every text of the files, duplicates included; binary files as the module says."""
    named = len(files) == 1
    total, done = sum(file.size for file in files), 0
    binary: list[tuple[SourceFile, int]] = []
    for file in files:
        content = _content(file.path)
        offset = first_binary_byte(content)
        if offset is None:
            yield from _texts(file, content)
        elif named:
            raise _binary(file.path, offset)
        else:
            binary.append((file, offset))
        done += file.size
        if progress:
            progress(done, total)
    if binary and len(binary) == len(files):
        raise _binary(files[0].path, binary[0][1])
    if binary:
        log.warning("left out %d binary files, the first is %s (byte %d)", len(binary), binary[0][0].path, binary[0][1])


def first_binary_byte(content: bytes) -> int | None:
    """Offset of the byte that makes a file binary, or None for text."""
    if b"\0" in content:
        return content.index(b"\0")
    try:
        content.decode("utf-8")
        return None
    except UnicodeDecodeError as error:
        undecodable = len(content) - len(content.decode("utf-8", "ignore").encode())
        return error.start if undecodable > BINARY_SHARE * len(content) else None


def text_document(domain: str, text: bytes) -> Document:
    """A document that is already in memory."""
    return Document(domain, hashlib.sha256(text).digest(), len(text), lambda: text)


def _walk(root: Path, skip: Path | None) -> Iterator[SourceFile]:
    visited: set[tuple[int, int]] = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        here = os.stat(folder)
        if (here.st_dev, here.st_ino) in visited or (skip and Path(folder).resolve() == skip):
            folders.clear()
            continue
        visited.add((here.st_dev, here.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            path = Path(folder, name)
            if name.startswith(".") or not path.exists():        # a link to nowhere
                continue
            found = path.stat()
            if stat.S_ISREG(found.st_mode) and found.st_size:
                yield SourceFile(path, path.relative_to(root).as_posix(), found.st_size, found.st_mtime_ns)


def _texts(file: SourceFile, content: bytes) -> Iterator[Document]:
    domain = _domain(file.name)
    if not file.name.endswith(".jsonl"):
        text = content.removeprefix(codecs.BOM_UTF8)
        if text:
            digest = hashlib.sha256(text).digest()
            yield Document(domain, digest, len(text), partial(_read_again, file.path, 0, None, digest))
        return
    offset = 0
    for number, line in enumerate(content.splitlines(keepends=True), 1):
        if line.removeprefix(codecs.BOM_UTF8).strip():
            text, own_domain = _parse(file.path, line, number, offset)
            if text:
                digest = hashlib.sha256(text).digest()
                yield Document(own_domain or domain, digest, len(text),
                               partial(_read_again, file.path, offset, len(line), digest))
        offset += len(line)


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


def _read_again(path: Path, offset: int, length: int | None, digest: bytes) -> bytes:
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            content = file.read(-1 if length is None else length)
        text = content.removeprefix(codecs.BOM_UTF8) if length is None else _parse(path, content, 0, offset)[0]
    except (OSError, DataError) as error:
        raise _changed(path, offset) from error
    if hashlib.sha256(text).digest() != digest:
        raise _changed(path, offset)
    return text


def _domain(name: str) -> str:
    folder, slash, _ = name.partition("/")
    return folder if slash else Path(name).suffix.removeprefix(".") or "text"


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(30, "the text cannot be read", where=f"{path} (data.path)", why=error.strerror or str(error),
                     next="data.path=<file or folder of text>, or data.path=null for the built-in corpus")


def _binary(path: Path, offset: int) -> DataError:
    return DataError(31, "the file is binary, not text", where=f"{path}, byte {offset:,}",
                     why=f"a NUL byte, or more than {BINARY_SHARE:.0%} of the bytes are not UTF-8",
                     next="convert it to UTF-8 text, or give a folder of text: data.path=<folder>")


def _changed(path: Path, offset: int) -> DataError:
    return DataError(34, "a text changed while it was read", where=f"{path}, byte {offset:,}",
                     why="its content is not what the first pass saw", next="run again when nothing writes to the file")
