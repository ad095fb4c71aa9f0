"""Files and folders to documents.

What a file holds is told by its content: text, records or a table, compressed or not (formats.py); a document is a text file or
a record. Its domain is what the record says, else the first folder below the path given, else the suffix without the dot
(`text` when there is none). Neither the suffix of a compression nor the number of a shard counts as one: `a.txt.gz` and
`a.txt.00003-of-00010` are `txt`.

What happens to odd input: hidden files are left out; links are followed, each folder once; a byte order mark is
dropped; CRLF and undecodable bytes are kept as they are; empty texts are left out. A file that is no text is refused when it is
all that there is, left out with one warning when it lies beside others (encodings.py has the limits, foreign.py the formats).
A record that cannot be used is refused.

Every text is read twice: for its digest, and to be tokenised once it is known which side it is on. Both times a block at a
time, so a document may be larger than memory.
"""

import logging
import os
import re
import stat
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from moetrain.data.account import FileEntry, NotText
from moetrain.data.compressed import inner_name
from moetrain.data.document import Document
from moetrain.data.reading import read_file
from moetrain.data.records import Reading
from moetrain.data.spool import Spool
from moetrain.errors import DataError
from moetrain.files import reason

log = logging.getLogger(__name__)

_SHARD = re.compile(r"\d+(?:[-_]of[-_]\d+)?")              # of a suffix: 00, 00000-of-01024


class SourceFile(NamedTuple):
    path: Path
    name: str                       # relative to the path the user gave
    size: int
    mtime_ns: int
    ctime_ns: int                   # nobody can set it: a file edited with its size and time kept differs here

    @classmethod
    def of(cls, path: Path, name: str, found: os.stat_result) -> "SourceFile":
        return cls(path, name, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def scan(path: Path, *, exclude: tuple[Path, ...] = (), key: str = "data.path") -> list[SourceFile]:
    """The regular files at or below `path`, sorted by name.

    exclude: files and folders below it to stay out of, such as our own output. key: the key that named the path.
    """
    try:
        found = path.stat()
        if not stat.S_ISDIR(found.st_mode):
            return [SourceFile.of(path, path.name, found)]
        skip = {_identity(place.stat()) for place in exclude if place.exists()} - {_identity(found)}
        return sorted(_walk(path.resolve(), skip), key=lambda file: file.name)
    except OSError as error:
        raise _unreadable(path, error, key) from error


def documents(files: list[SourceFile], *, spool: Spool, reading: Reading = Reading(), key: str = "data.path",
              progress: Callable[[int, int], None] | None = None) -> Iterator[Document]:
    """Every text of the files, duplicates included; files that are no text as the module says."""
    total, done = sum(file.size for file in files), 0
    entries: list[FileEntry] = []
    refused: list[tuple[SourceFile, NotText]] = []
    for file in files:
        advance = partial(_advance, progress, done, file.size, total) if progress else None
        entry = FileEntry(file.name, file.size)
        try:
            yield from read_file(file.path, domain_of(file.name), entry, reading, spool, advance)
            entries.append(entry)
        except NotText as error:
            refused.append((file, error))
        except OSError as error:
            raise _unreadable(file.path, error, key) from error
        done += file.size
        if progress:
            progress(done, total)
    if refused and len(refused) == len(files):
        raise _not_text(*refused[0], key)
    if refused:
        (first, error), size = refused[0], sum(file.size for file, _ in refused)
        log.warning("left out %d files that are no text, %s bytes, the first is %s: %s", len(refused), f"{size:,}", first.path,
                    error.format)
    _warn_of_undecodable(entries)


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
                yield SourceFile.of(path, path.relative_to(root).as_posix(), found)


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _advance(progress: Callable[[int, int], None], before: int, size: int, total: int, position: int) -> None:
    progress(before + min(position, size), total)


def domain_of(name: str) -> str:
    """The domain of a file by its place below the path given."""
    folder, slash, _ = name.partition("/")
    parts = inner_name(name).split(".")
    while len(parts) > 1 and _SHARD.fullmatch(parts[-1]):
        parts.pop()
    domain = folder if slash else Path(".".join(parts)).suffix.removeprefix(".") or "text"
    return os.fsencode(domain).decode("utf-8", "backslashreplace")          # a name that is not UTF-8 has a readable one, too


def _warn_of_undecodable(entries: list[FileEntry]) -> None:
    marred = [entry for entry in entries if entry.undecodable]
    if marred:
        worst = max(marred, key=lambda entry: entry.undecodable)
        log.warning("%s bytes in %d files are no characters in data.encoding, most of them in %s%s",
                    f"{sum(entry.undecodable for entry in marred):,}", len(marred), worst.name,
                    f"; {worst.convert} may read it" if worst.convert else "")


def _not_text(file: SourceFile, error: NotText, key: str) -> DataError:
    otherwise = error.convert or "convert it to UTF-8 text"
    return DataError(31, f"not text: {error.format}", where=f"{file.path}, byte {error.offset:,} ({key})", why=error.why,
                     next=f"{otherwise}; or give a folder of text: {key}=<folder>")


def _unreadable(path: Path, error: OSError, key: str) -> DataError:
    otherwise = ", or data.path=null for the built-in corpus" if key == "data.path" else ""
    return DataError(30, "the text cannot be read", where=f"{path} ({key})", why=reason(error),
                     next=f"{key}=<file or folder of text>{otherwise}")
