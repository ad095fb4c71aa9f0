"""Streams of JSON records: one a line, in an array, or concatenated. One record at a time is in memory."""

import json
from collections.abc import Callable, Iterator
from typing import Any

from moetrain.data.reading.records import LONGEST_RECORD, RecordFields, malformed, too_long
from moetrain.data.reading.text_file import TextFile

BLANK = " \t\n\r"
_DEEP = "it is nested too deep"


def json_lines(file: TextFile) -> Iterator[tuple[bytes, str]]:
    """Yield text and own domain of one object a line. Blank lines are skipped."""
    number, offset = 0, file.mark_size

    def place() -> str:
        return f"{file.path}, line {number}" + (f", byte {offset:,}" if file.in_utf8 else "")

    fields = RecordFields(file.reading, file.entry, place)
    for line in _lines(file):
        number += 1
        if len(line) > LONGEST_RECORD:
            raise too_long(place())
        if line.strip():
            yield fields.of(_parse(line, place))
        offset += len(line)
    fields.end(file.path)


def json_objects(file: TextFile, *, array: bool) -> Iterator[tuple[bytes, str]]:
    """Yield text and own domain of the objects or strings of an array, or of concatenated objects.

    Args:
        file: the file, at its start.
        array: whether the records are in an array.
    """
    number, values, kind = 0, _Values(file.blocks()), dict

    def place() -> str:
        return f"{file.path}, record {number}, line {values.line}"

    fields = RecordFields(file.reading, file.entry, place)
    if array:
        values.skip("[")
        more = values.next_character() != "]"
    else:
        more = values.next_character() != ""
    while more:
        number += 1
        try:
            value = values.value()
        except ValueError as error:
            fault = too_long(place()) if values.full else malformed(place(), f"it is not JSON: {error}")
            raise fault from error
        if array and number == 1 and isinstance(value, str):
            kind = str
        if not isinstance(value, kind):
            raise malformed(place(), "it is not an object" if kind is dict
                            else "it is not a string, as those before it are")
        yield fields.of(value)
        if not array:
            more = values.next_character() != ""
        elif more := values.next_character() == ",":
            values.skip(",")
    if array and values.next_character() != "]":
        raise malformed(place(),
                        "the array does not end behind it: a comma is missing, or the file is cut off")
    if array:
        values.skip("]")
    if values.next_character():
        raise malformed(place(), "something follows the end of the array")
    fields.end(file.path)


def _lines(file: TextFile) -> Iterator[bytes]:
    """Lines with their ends; a lone carriage return ends one, too.

    A line over LONGEST_RECORD is yielded as far as it was read, for the caller to refuse.
    """
    held: list[bytes] = []
    size = 0
    for block in file.blocks():
        end = block.rfind(b"\n") + 1
        if not end:
            held.append(block)
            size += len(block)
            if size > LONGEST_RECORD:
                yield b"".join(held)
            continue
        yield from b"".join((*held, block[:end])).splitlines(keepends=True)
        held, size = [block[end:]] if end < len(block) else [], len(block) - end
    yield from b"".join(held).splitlines(keepends=True)


def _parse(line: bytes, place: Callable[[], str]) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8", "replace"))
    except ValueError as error:
        raise malformed(place(), f"the line is not JSON: {error}") from error
    except RecursionError as error:
        raise malformed(place(), _DEEP) from error
    if not isinstance(record, dict):
        raise malformed(place(), "the line is not an object")
    return record


class _Values:
    """Incremental parser of JSON values in blocks of text.

    A value that does not parse may go on in the next block: then twice as much text is read and parsed again.
    `full` is set once a value was longer than LONGEST_RECORD.
    """

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks, self._decoder = blocks, json.JSONDecoder()
        self._text, self._at, self._before = "", 0, 1
        self.full = False

    @property
    def line(self) -> int:
        """Line number of the current position, from 1."""
        return self._before + self._text.count("\n", 0, self._at)

    def next_character(self) -> str:
        """The next character that is not blank, without consuming it; empty at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in BLANK:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more(1):
                return ""

    def skip(self, character: str) -> None:
        """Consume the given character, which must be the next one that is not blank."""
        found = self.next_character()
        assert found == character, (found, character)
        self._at += 1

    def value(self) -> Any:
        """Parse and consume the next value. ValueError if there is none."""
        self.next_character()
        while True:
            try:
                value, self._at = self._decoder.raw_decode(self._text, self._at)
                return value
            except RecursionError:
                raise ValueError(_DEEP) from None
            except json.JSONDecodeError as error:
                size = len(self._text) - self._at
                if not is_incomplete(error):
                    raise
                self.full = size > LONGEST_RECORD
                if self.full or not self._more(size):
                    raise

    def _more(self, least: int) -> bool:
        """Read at least `least` further characters if there are so many; False at the end."""
        pieces, size = [], 0
        while size < least and (block := next(self._blocks, b"")):
            pieces.append(block.decode("utf-8", "replace"))
            size += len(pieces[-1])
        self._before += self._text.count("\n", 0, self._at)
        self._text, self._at = "".join((self._text[self._at:], *pieces)), 0
        return size > 0


def is_incomplete(error: json.JSONDecodeError) -> bool:
    """Whether a parse may have failed only because the text is cut off: near its end, or inside a string."""
    return error.msg.startswith("Unterminated string") or error.pos > len(error.doc) - 16
