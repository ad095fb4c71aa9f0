"""Rows of comma- and tab-separated tables, quoted as in RFC 4180, under a header that names the columns.

A row with more or fewer cells than the header is refused, and so is a quote that never ends: either would
turn all that follows into other texts. The separator of a `.csv` file is the one of comma, semicolon and tab
that gives the column `data.text_key`.
"""

import csv
import io
from collections.abc import Iterator
from itertools import zip_longest

from moetrain.data.reading.records import LONGEST_RECORD, RecordFields, missing_key, too_long
from moetrain.data.reading.text_file import TextFile
from moetrain.errors import DataError

csv.field_size_limit(max(LONGEST_RECORD, csv.field_size_limit()))  # process-wide; 128 KiB by default

COMMA, SEMICOLON, TAB = ",", ";", "\t"


def table_rows(file: TextFile, separators: tuple[str, ...]) -> Iterator[tuple[bytes, str]]:
    """Yield text and own domain of every row. `separators` are the possible ones, the likeliest first."""
    lines = _lines(file)
    first = next(lines, "")
    separator = _separator(first, separators, file.reading.text_key or "")
    rows = csv.reader(_joined(first, lines), delimiter=separator, strict=True)

    def place() -> str:
        return f"{file.path}, line {max(rows.line_num, 1)}"

    fields, header = RecordFields(file.reading, file.entry, place), []
    try:
        header = next(rows, [])
        if (file.reading.text_key or "") not in header:
            raise missing_key(file.reading.text_key or "",
                              dict(zip_longest(header, next(rows, [])[:len(header)])), place())
        if len(set(header)) < len(header):
            twice = sorted({name for name in header if header.count(name) > 1})
            raise _malformed(place(), f"its header names a column twice: {', '.join(twice)}")
        for row in rows:
            if len(row) == len(header):
                yield fields.of(dict(zip(header, row)))
            elif row:
                raise _malformed(place(), f"the row has {len(row)} cells, the header {len(header)}")
    except csv.Error as error:
        raise _malformed(place(), str(error)) from error
    fields.end(file.path)


def header_of(line: str, separator: str) -> list[str]:
    """Cells of a header line; empty if the line is no row."""
    try:
        return next(csv.reader([line], delimiter=separator, strict=True), [])
    except csv.Error:
        return []


def _separator(line: str, separators: tuple[str, ...], key: str) -> str:
    headers = {separator: header_of(line, separator) for separator in separators}
    with_key = [separator for separator in separators if key in headers[separator]]
    return with_key[0] if with_key else max(separators, key=lambda separator: len(headers[separator]))


def _joined(first: str, lines: Iterator[str]) -> Iterator[str]:
    if first:
        yield first
        yield from lines


def _lines(file: TextFile) -> Iterator[str]:
    """Whole lines, because the csv parser takes the end of each string it gets for the end of a line."""
    held, size = [], 0
    for block in file.blocks():
        end = block.rfind(b"\n") + 1
        held.append(block[:end] if end else block)
        size += len(held[-1])
        if size > LONGEST_RECORD:
            raise too_long(f"{file.path}, a line of more than {LONGEST_RECORD:,} bytes")
        if end:
            yield from io.StringIO(b"".join(held).decode("utf-8", "replace"), newline="\n")
            held, size = [block[end:]], len(block) - end
    if size:
        yield b"".join(held).decode("utf-8", "replace")


def _malformed(place: str, why: str) -> DataError:
    return DataError(133, "a table cannot be read", where=place, why=why,
                     next="write it with every cell that holds a separator, a quote or a line break in "
                          "quotes, and quotes doubled; or "
                          "data.text_key=null to train on every file as it stands")
