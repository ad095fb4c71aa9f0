"""Reader of the documents of a file in any supported format.

A text file is one document; with `data.separator` a document is the text between two such lines. A document
is read again from its file where possible. A `Spool` keeps the others: records, which would have to be parsed
again, and texts of files that are compressed, in which no place can be looked up, or in another encoding.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from moetrain.data.account.ledgers import FileEntry, NotText
from moetrain.data.reading import formats
from moetrain.data.reading.compressed import ByteStream
from moetrain.data.reading.documents import Document, spooled_document
from moetrain.data.reading.json_records import json_lines, json_objects
from moetrain.data.reading.parquet import parquet_rows
from moetrain.data.reading.records import Reading
from moetrain.data.reading.spool import Spool
from moetrain.data.reading.table_records import COMMA, SEMICOLON, TAB, table_rows
from moetrain.data.reading.text_file import TextFile
from moetrain.errors import DataError

Advance = Callable[[int], None]     # called with the bytes of a file read so far


def read_file(path: Path, domain: str, entry: FileEntry, reading: Reading, spool: Spool,
              advance: Advance | None = None) -> Iterator[Document]:
    """Yield the documents of a file. NotText, before the first document, if it is no text.

    Args:
        path: a regular file.
        domain: domain of documents that name none.
        entry: filled in with format, compression, undecodable bytes and empty texts.
        reading: keys, separator and encoding.
        spool: keeps texts that are not read from the file again.
        advance: called with the bytes of the file read so far.
    """
    with ByteStream(path) as stream:
        entry.compression = stream.compression.name if stream.compression else ""
        file, start, taken = TextFile(path, stream, reading, entry, advance), spool.size, False
        try:
            entry.format = formats.recognize(file)
            documents_of = _texts if formats.is_text(entry.format) else _records
            for document in documents_of(file, domain, spool):
                if document.size:
                    taken = True
                    yield document
                else:
                    entry.empty += 1
        except NotText as error:
            if not taken:
                spool.cut(start)
                raise
            raise _not_text_error(path, error) from error


def _records(file: TextFile, domain: str, spool: Spool) -> Iterator[Document]:
    for text, own in _rows(file, spool):
        yield spooled_document(own or domain, text, spool)


def _rows(file: TextFile, spool: Spool) -> Iterator[tuple[bytes, str]]:
    """Text and own domain of the records of a file, by its format."""
    match file.entry.format:
        case formats.JSON_LINES:
            return json_lines(file)
        case formats.JSON_ARRAY | formats.JSON_OBJECTS as form:
            return json_objects(file, array=form == formats.JSON_ARRAY)
        case formats.CSV:
            return table_rows(file, (COMMA, SEMICOLON, TAB))
        case formats.TSV:
            return table_rows(file, (TAB,))
        case form:
            assert form == formats.PARQUET, form
            return parquet_rows(file, spool)


def _texts(file: TextFile, domain: str, spool: Spool) -> Iterator[Document]:
    """Documents of a text file."""
    separator = file.reading.separator
    from_file = separator is None and file.in_utf8 and file.stream.compression is None
    digest, size, start = hashlib.sha256(), 0, spool.size
    for piece in _pieces(file.blocks(), separator):
        if piece is None:
            yield Document(domain, digest.digest(), size, None, start)
            digest, size, start = hashlib.sha256(), 0, spool.size
            continue
        digest.update(piece)
        size += len(piece)
        if not from_file:
            spool.append(piece)
    if size or separator is None:
        yield Document(domain, digest.digest(), size, file.path if from_file else None, start)


def _pieces(blocks: Iterator[bytes], separator: str | None) -> Iterator[bytes | None]:
    """The text in pieces, with None at the end of each document.

    Lines that separate documents belong to none of them.
    """
    if separator is None:
        yield from blocks
        return
    line = re.compile(rb"^" + re.escape(separator.encode()) + rb"\r?(?:\n|\Z)", re.MULTILINE)
    begins = True                                        # whether the block starts at the beginning of a line
    for block in blocks:
        at = 0
        for match in line.finditer(block):
            if match.start() or begins:
                if at < match.start():
                    yield block[at:match.start()]
                yield None
                at = match.end()
        if at < len(block):
            yield block[at:]
        begins = block.endswith(b"\n")


def _not_text_error(path: Path, error: NotText) -> DataError:
    """The error for a file that turned out to be no text after documents of it were used."""
    return DataError(136, "a file turned out to be no text after a part of it",
                     where=f"{path}, byte {error.offset:,}", why=error.why,
                     next=error.convert or "repair the file, or take it out of the folder")
