"""Format of a file, recognized by content: text, JSON records, a table, Parquet, or one that is not read.

A file that begins like records must go on like them, or it is text:

    JSON lines    the first two lines are objects; or the first is one with the text key; or the suffix says
                  so, and the file is none of the next two
    JSON array    it begins with an object, or with a string of several words
    JSON objects  one over several lines: with the text key, or not empty and with another behind it. A file
                  of one object without the text key is text: a notebook, a package.json
    CSV, TSV      the suffix says so; or the first line is names, one of them the text key, and the next has
                  as many cells
    Parquet       its first bytes

With `data.text_key=null` every file is text as it stands.
"""

import json
import re
from pathlib import Path

from moetrain.data.account.ledgers import NotText
from moetrain.data.reading import parquet
from moetrain.data.reading.json_records import BLANK, is_incomplete
from moetrain.data.reading.records import look_up
from moetrain.data.reading.table_records import COMMA, TAB, header_of
from moetrain.data.reading.text_file import TextFile
from moetrain.data.reading.unsupported import refuse_unsupported, refuse_unsupported_json

TEXT, TEXT_OF_JSON = "text", "JSON as text"
JSON_LINES, JSON_ARRAY, JSON_OBJECTS = "JSON lines", "JSON array", "JSON objects"
CSV, TSV, PARQUET = "CSV", "TSV", "Parquet"

_HEAD = 1 << 16                     # bytes looked at first; they must hold a whole record
_MOST_HEAD = 16 << 20               # bytes looked at where a record is longer
_LINES = (".jsonl", ".ndjson", ".jsonlines")
_TABLES = {".csv": CSV, ".tsv": TSV}
_NAME = re.compile(r"[^\W\d][\w.\-]*")
_DECODER = json.JSONDecoder()


def is_text(form: str) -> bool:
    """Whether files of a format are read as text."""
    return form in (TEXT, TEXT_OF_JSON)


def recognize(file: TextFile) -> str:
    """Format of a file. NotText if it is one that is not read."""
    head, suffix, key = file.stream.peek(_HEAD), Path(file.name).suffix.lower(), file.reading.text_key
    refuse_unsupported(head, file.path, file.name)
    if head.startswith(parquet.MAGIC):
        if key is None:
            raise NotText("a Parquet file",
                          why="data.text_key=null trains on files as they stand, and this is no text",
                          convert="data.text_key=<a column of strings>")
        return PARQUET
    if key is None:
        return TEXT
    if suffix in _LINES:
        found = _json(file, key)
        if found == JSON_ARRAY or found == JSON_OBJECTS and not _one_a_line(file.beginning(_HEAD)[0]):
            return found
        return JSON_LINES
    found = _json(file, key) or _TABLES.get(suffix) or _table(file.beginning(_HEAD)[0], key)
    return found or (TEXT_OF_JSON if suffix == ".json" else TEXT)


def _json(file: TextFile, key: str) -> str | None:
    """JSON format of a file, looking at more of it until that can be decided; None if it is none."""
    size = _HEAD
    begin, whole = file.beginning(size)
    begins = begin.lstrip(BLANK)[:1]
    if begins not in ("{", "["):
        return None
    while True:
        answer = _json_array(begin, whole, key) if begins == "[" else _json_objects(begin, whole, key, file)
        if answer != _MORE:
            return answer
        if size >= _MOST_HEAD:
            named = re.search(rf'"{re.escape(key.rpartition(".")[2])}"\s*:\s*"', begin)
            return (JSON_ARRAY if begins == "[" else JSON_OBJECTS) if named else None
        size *= 4
        begin, whole = file.beginning(size)


_MORE = "more"                      # the beginning is too short to decide


def _json_array(begin: str, whole: bool, key: str) -> str | None:
    at = len(begin) - len(begin.lstrip(BLANK)) + 1
    value, end = _value(begin, at, whole)
    if end is None:
        return _MORE
    behind = begin[end:].lstrip(BLANK)[:1]
    if not behind and not whole:
        return _MORE
    ends = behind in (",", "]", "")
    is_record = isinstance(value, dict) and (ends or isinstance(look_up(value, key)[1], str))
    is_record |= isinstance(value, str) and " " in value.strip() and ends
    return JSON_ARRAY if is_record else None


def _json_objects(begin: str, whole: bool, key: str, file: TextFile) -> str | None:
    value, end = _value(begin, 0, whole)
    if end is None:
        return _MORE
    if not isinstance(value, dict):
        return None
    behind = begin[end:].lstrip(BLANK)
    second, second_end = _value(behind, 0, whole) if behind else (None, None)
    if not whole and second_end is None:
        return _MORE
    has_key = isinstance(look_up(value, key)[1], str)
    if not behind:
        refuse_unsupported_json(value, file.path)
        return JSON_OBJECTS if has_key else None
    if has_key or (value and isinstance(second, dict)):
        return JSON_LINES if _one_a_line(begin) else JSON_OBJECTS
    return None


def _one_a_line(begin: str) -> bool:
    """Whether the first line alone is an object."""
    first = re.split(r"[\r\n]", begin.lstrip(BLANK), maxsplit=1)[0]
    return isinstance(_value(first, 0, True)[0], dict)


def _value(text: str, at: int, whole: bool) -> tuple[object, int | None]:
    """Parse a JSON value in a text.

    Args:
        text: the text.
        at: where the value begins, after blanks.
        whole: whether the text is the whole file.

    Returns:
        The value, None if there is none, and its end, None if the text is too short to tell.
    """
    at += len(text[at:]) - len(text[at:].lstrip(BLANK))
    try:
        return _DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        return None, None if is_incomplete(error) and not whole else at
    except RecursionError:
        return None, at


def _table(begin: str, key: str) -> str | None:
    """Format of a table without the suffix of one; None if the text is no table.

    It needs a header of names and a row that fits it. Prose has no such first line.
    """
    first, _, rest = begin.partition("\n")
    for separator, name in ((TAB, TSV), (COMMA, CSV)):
        header = header_of(first.rstrip("\r"), separator)
        if len(header) > 1 and key in header and all(map(_NAME.fullmatch, header)):
            # Cells may hold line breaks, so the first row may take several lines.
            lines = rest.split("\n")[:200]
            if any(len(header_of("\n".join(lines[:number]), separator)) == len(header)
                   for number in range(1, len(lines) + 1)):
                return name
    return None
