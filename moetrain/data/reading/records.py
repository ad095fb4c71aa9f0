"""Text and domain of a record: the values of `data.text_key` and `data.domain_key`.

A record is an object of JSON or a row of a table. A key is looked up as it is written, then as a path:
`meta.source` is `source` in the object `meta`. A domain that is absent, null or empty is that of the file; a
text that is null is empty.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

from moetrain.config.schema import DataConfig
from moetrain.data.account.ledgers import FileEntry
from moetrain.errors import DataError
from moetrain.files import shown

LONGEST_RECORD = 256 << 20          # bytes of a record, which is parsed as a whole
_MOST_KEYS = 20                     # listed in a message
_SURROGATE = re.compile("[\ud800-\udfff]")


class Reading(NamedTuple):
    """How files are read, by the keys of the config section `data`.

    Args:
        text_key: key of the text of a record; None reads every file as text as it stands.
        domain_key: key of the domain of a record; None: records have none.
        separator: a line that ends a document inside a text file.
        encoding: encoding of files without a byte order mark.
    """

    text_key: str | None = "text"
    domain_key: str | None = "domain"
    separator: str | None = None
    encoding: str = "utf-8"


_DEFAULT = Reading()


def reading_of(data: DataConfig) -> Reading:
    """The part of the config that says how files are read."""
    return Reading(data.text_key, data.domain_key, data.separator, data.encoding)


class RecordFields:
    """Extractor of text and domain from the records of one file.

    Args:
        reading: the keys.
        entry: row of the account in which undecodable bytes are counted.
        place: where the current record is, for errors.
    """

    def __init__(self, reading: Reading, entry: FileEntry, place: Callable[[], str]) -> None:
        assert reading.text_key is not None
        self._text_key, self._domain_key = reading.text_key, reading.domain_key
        self._entry, self._place = entry, place
        self._domains = self._records = 0
        self._last: dict[str, Any] = {}

    def of(self, record: dict[str, Any] | str) -> tuple[bytes, str]:
        """Text and domain of one record. A string is the text itself.

        Returns:
            The text as UTF-8, and the record's own domain, empty if it has none.
        """
        if isinstance(record, str):
            return self.text(record), ""
        found, text = look_up(record, self._text_key)
        if not found:
            raise missing_key(self._text_key, record, self._place())
        there, domain = look_up(record, self._domain_key) if self._domain_key else (False, None)
        self._domains, self._last = self._domains + there, record
        return self.text(text), self.domain(domain)

    def text(self, value: Any) -> bytes:
        """A text value as UTF-8.

        Lone surrogates, which JSON can express, become U+FFFD and are counted.
        """
        self._records += 1
        if isinstance(value, str):
            try:
                return value.encode()
            except UnicodeEncodeError:
                value, number = _SURROGATE.subn("\ufffd", value)
                self._entry.undecodable += 3 * number
                return value.encode()
        if value is None:
            return b""
        if isinstance(value, bytes):                     # a Parquet column of binary type instead of string
            self._entry.undecodable += len(value) - len(value.decode("utf-8", "ignore").encode())
            return value
        raise self._wrong(self._text_key, "text", "data.text_key", value)

    def domain(self, value: Any) -> str:
        """A domain value as a name; empty for null."""
        if isinstance(value, str):
            return value.encode("utf-8", "replace").decode()
        if value is None:
            return ""
        raise self._wrong(self._domain_key or "", "domain", "data.domain_key", value)

    def end(self, path: Path) -> None:
        """Close the file after its last record.

        DataError if the user named a domain key that no record of the file has.
        """
        if self._records and not self._domains and self._domain_key not in (None, _DEFAULT.domain_key):
            raise no_domain(self._domain_key or "", list(flat_keys(self._last)), path)

    def _wrong(self, key: str, what: str, name: str, value: Any) -> DataError:
        return DataError(131, f"the {what} of a record is no string", where=self._place(),
                         why=f'"{shown(key)}" is {_kind(value)}',
                         next=f"{name}=<a key of strings>, or write this one as a string in the file")


def look_up(record: dict[str, Any], key: str) -> tuple[bool, Any]:
    """Whether a record has a key or path, and its value."""
    if key in record:
        return True, record[key]
    value: Any = record
    for part in key.split(".") if "." in key else ():
        if not isinstance(value, dict) or part not in value:
            return False, None
        value = value[part]
    return (True, value) if "." in key else (False, None)


def flat_keys(record: dict[str, Any], before: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Keys of a record with their values; those of nested objects as paths."""
    for key, value in record.items():
        if isinstance(value, dict) and value and depth < 4:
            yield from flat_keys(value, f"{before}{key}.", depth + 1)
        else:
            yield f"{before}{key}", value


def missing_key(key: str, record: dict[str, Any], place: str, *, as_text: bool = True) -> DataError:
    """The error for a record without the text key.

    Args:
        key: the text key.
        record: the record, whose keys the message lists.
        place: where it is.
        as_text: whether the file could be read as text instead.
    """
    keys = list(flat_keys(record))
    longest = max(((len(value), name) for name, value in keys if isinstance(value, str)), default=(0, ""))[1]
    likely = quote(shown(longest)) if longest else "<a key of strings>"
    return DataError(130, f'a record has no "{shown(key)}"', where=place,
                     why=f"it has {_listed([name for name, _ in keys])}" if keys else "it is empty",
                     next=f"data.text_key={likely}"
                     + ", or data.text_key=null to train on every file as it stands" * as_text)


def no_domain(key: str, keys: list[tuple[str, Any]], path: Path) -> DataError:
    """The error for a file in which no record has the domain key.

    Args:
        key: the domain key.
        keys: keys of its last record.
        path: the file.
    """
    return DataError(132, f'no record of a file has "{shown(key)}"', where=f"{path} (data.domain_key)",
                     why=f"its last one has {_listed([name for name, _ in keys])}",
                     next="data.domain_key=<one of them>, or data.domain_key=null: the domain is the "
                          "folder's or the suffix")


def too_long(place: str) -> DataError:
    """The error for a record of more than LONGEST_RECORD bytes."""
    return DataError(103, "a record is too long", where=place,
                     why=f"it is parsed as a whole, and has {LONGEST_RECORD:,} bytes at most",
                     next="give long texts as files of their own: a folder of .txt files")


def malformed(place: str, problem: str) -> DataError:
    """The error for a record that cannot be parsed."""
    return DataError(33, "a record cannot be used", where=place, why=problem,
                     next='one object like {"text": "...", "domain": "..."} a line, or an array of them; '
                          "data.text_key=null trains on every file as it stands")


def _listed(keys: list[str]) -> str:
    more = f" and {len(keys) - _MOST_KEYS} more" if len(keys) > _MOST_KEYS else ""
    return ", ".join(shown(key, 80) for key in keys[:_MOST_KEYS]) + more


def _kind(value: Any) -> str:
    named = {bool: "true or false", int: "a number", float: "a number", dict: "an object", list: "a list"}
    return f"{named.get(type(value), type(value).__name__)}: {shown(repr(value), 60)}"
