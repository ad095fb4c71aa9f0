"""Documents of files and folders.

The format of a file is recognized by content: text, records or a table, compressed or not
(`reading/formats.py`). A document is a text file or a record. Its domain is the record's own, else the first
folder below the given path, else the suffix without its dot (`text` if there is none). The suffix of a
compression and the number of a shard do not count: `a.txt.gz` and `a.txt.00003-of-00010` are `txt`.

Odd input: a byte order mark is dropped; CRLF and undecodable bytes are kept as they are; empty texts are left
out. A file that is no text is refused if there is nothing else, and left out if it is beside others (limits
in `reading/encodings.py`, formats in `reading/unsupported.py`). A record that cannot be used is refused.

Every text is read twice: for its digest, and again to be tokenized once its side of the split is known. Both
passes read it block by block, so a document may be larger than memory.
"""

import logging
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from moetrain.data.account.ledgers import BINARY, TRAINED, FileEntry, NotText
from moetrain.data.corpus.scan import SourceFile, unreadable
from moetrain.data.reading.compressed import inner_name
from moetrain.data.reading.documents import Document
from moetrain.data.reading.formats import is_text
from moetrain.data.reading.reader import read_file
from moetrain.data.reading.records import Reading
from moetrain.data.reading.spool import Spool
from moetrain.errors import DataError
from moetrain.files import shown

log = logging.getLogger(__name__)

_SHARD = re.compile(r"\d+(?:[-_]of[-_]\d+)?")              # a suffix such as 00, 00000-of-01024


def documents(files: list[SourceFile], *, spool: Spool, reading: Reading = Reading(), key: str = "data.path",
              progress: Callable[[int, int], None] | None = None) -> Iterator[Document]:
    """Yield every text of the files, duplicates included. Files that are no text are refused or left out.

    Args:
        files: the files, of one key.
        spool: keeps texts that cannot be read again from their files.
        reading: how files are read.
        key: config key that names the files.
        progress: called with the bytes read and the bytes of all files.
    """
    total, done = sum(file.entry.size for file in files), 0
    refused: list[tuple[SourceFile, NotText]] = []
    for file in files:
        advance = partial(_advance, progress, done, file.entry.size, total) if progress else None
        try:
            for document in read_file(file.path, domain_of(file.label), file.entry, reading, spool, advance):
                file.entry.documents += 1
                file.entry.text += document.size
                yield document
        except NotText as error:
            file.entry.leave_out(BINARY, format=error.format, convert=error.convert)
            refused.append((file, error))
        except OSError as error:
            raise unreadable(file.path, error, key) from error
        done += file.entry.size
        if progress:
            progress(done, total)
    if refused and len(refused) == len(files):
        raise _not_text(*refused[0], key)
    entries = [file.entry for file in files]
    # Held-out text may be of another kind.
    if key == "data.path" and all(entry.side == TRAINED for entry in entries):
        _refuse_keys_of_nothing(entries, reading)
    _warn_of_undecodable(entries)


def _advance(progress: Callable[[int, int], None], before: int, size: int, total: int, position: int) -> None:
    progress(before + min(position, size), total)


def domain_of(name: str) -> str:
    """Domain of a file by its name below the given path."""
    folder, slash, _ = name.partition("/")
    parts = inner_name(name).split(".")
    while len(parts) > 1 and _SHARD.fullmatch(parts[-1]):
        parts.pop()
    domain = folder if slash else Path(".".join(parts)).suffix.removeprefix(".") or "text"
    # A name that is not UTF-8 becomes a readable one.
    return os.fsencode(domain).decode("utf-8", "backslashreplace")


def _refuse_keys_of_nothing(entries: list[FileEntry], reading: Reading) -> None:
    """Check keys that the user set and that match nothing.

    They are wrong, or the files are not what they seem. A text key is refused; a separator that no file has
    is a warning.
    """
    read = [entry for entry in entries if not entry.reason]
    texts = [entry for entry in read if is_text(entry.format)]
    if reading.text_key not in (None, Reading().text_key) and read and len(texts) == len(read):
        raise DataError(137, "no file holds records", where=f"data.text_key={shown(reading.text_key)}",
                        why=f"all {len(read)} files, as {shown(read[0].name)}, are text: neither JSON lines, "
                            "nor JSON with objects that have this key, nor a table",
                        next="data.text_key=text to read them as text, or write their texts as JSON lines")
    if reading.separator is not None and texts and all(entry.documents + entry.empty < 2 for entry in texts):
        log.warning("no text file has a line that is data.separator=%s: each of them is one document",
                    shown(reading.separator))


def _warn_of_undecodable(entries: list[FileEntry]) -> None:
    marred = [entry for entry in entries if entry.undecodable]
    if marred:
        worst = max(marred, key=lambda entry: entry.undecodable)
        log.warning("not characters in data.encoding: bytes in %d of %d files, %s in all, "
                    "most of them in %s%s",
                    len(marred), len(entries), f"{sum(entry.undecodable for entry in marred):,}", worst.name,
                    f"; {worst.convert} may read it" if worst.convert else "")


def _not_text(file: SourceFile, error: NotText, key: str) -> DataError:
    otherwise = error.convert or "convert it to UTF-8 text"
    return DataError(31, f"not text: {error.format}", where=f"{file.path}, byte {error.offset:,} ({key})",
                     why=error.why, next=f"{otherwise}; or give a folder of text: {key}=<folder>")
