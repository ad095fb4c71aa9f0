"""Files and folders to documents.

What a file holds is told by its content: text, records or a table, compressed or not (data/reading/formats.py); a document is a text file or
a record. Its domain is what the record says, else the first folder below the path given, else the suffix without the dot
(`text` when there is none). Neither the suffix of a compression nor the number of a shard counts as one: `a.txt.gz` and
`a.txt.00003-of-00010` are `txt`.

What happens to odd input: a byte order mark is dropped; CRLF and undecodable bytes are kept as they are; empty texts are left
out. A file that is no text is refused when it is all that there is, left out when it lies beside others (data/reading/encodings.py has the
limits, data/reading/unsupported.py the formats). A record that cannot be used is refused.

Every text is read twice: for its digest, and to be tokenised once it is known which side it is on. Both times a block at a
time, so a document may be larger than memory.
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

_SHARD = re.compile(r"\d+(?:[-_]of[-_]\d+)?")              # of a suffix: 00, 00000-of-01024


def documents(files: list[SourceFile], *, spool: Spool, reading: Reading = Reading(), key: str = "data.path",
              progress: Callable[[int, int], None] | None = None) -> Iterator[Document]:
    """Every text of the files, duplicates included; files that are no text as the module says."""
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
    # held-out text may be of another kind
    if key == "data.path" and all(entry.side == TRAINED for entry in entries):
        _refuse_keys_of_nothing(entries, reading)
    _warn_of_undecodable(entries)


def _advance(progress: Callable[[int, int], None], before: int, size: int, total: int, position: int) -> None:
    progress(before + min(position, size), total)


def domain_of(name: str) -> str:
    """The domain of a file by its place below the path given."""
    folder, slash, _ = name.partition("/")
    parts = inner_name(name).split(".")
    while len(parts) > 1 and _SHARD.fullmatch(parts[-1]):
        parts.pop()
    domain = folder if slash else Path(".".join(parts)).suffix.removeprefix(".") or "text"
    # a name that is not UTF-8 has a readable one, too
    return os.fsencode(domain).decode("utf-8", "backslashreplace")


def _refuse_keys_of_nothing(entries: list[FileEntry], reading: Reading) -> None:
    """A key that was typed and finds nothing is a wrong one, or the files are not what they are taken for."""
    read = [entry for entry in entries if not entry.reason]
    texts = [entry for entry in read if is_text(entry.format)]
    if reading.text_key not in (None, Reading().text_key) and read and len(texts) == len(read):
        raise DataError(137, "no file holds records", where=f"data.text_key={shown(reading.text_key)}",
                        why=f"all {len(read)} files, as {shown(read[0].name)}, are text: neither JSON lines, "
                            "nor JSON with "
                            "objects that have this key, nor a table",
                        next="data.text_key=text to read them as text, or write their texts as JSON lines")
    if reading.separator is not None and texts and all(entry.documents + entry.empty < 2 for entry in texts):
        log.warning("no text file has a line that is data.separator=%s: each of them is one document",
                    shown(reading.separator))


def _warn_of_undecodable(entries: list[FileEntry]) -> None:
    marred = [entry for entry in entries if entry.undecodable]
    if marred:
        worst = max(marred, key=lambda entry: entry.undecodable)
        log.warning("not characters in data.encoding: bytes in %d of %d files, %s in all, most of them in "
                    "%s%s",
                    len(marred), len(entries), f"{sum(entry.undecodable for entry in marred):,}", worst.name,
                    f"; {worst.convert} may read it" if worst.convert else "")


def _not_text(file: SourceFile, error: NotText, key: str) -> DataError:
    otherwise = error.convert or "convert it to UTF-8 text"
    return DataError(31, f"not text: {error.format}", where=f"{file.path}, byte {error.offset:,} ({key})",
                     why=error.why, next=f"{otherwise}; or give a folder of text: {key}=<folder>")
