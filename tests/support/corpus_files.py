"""Files in the shapes in which people have text, with their contents, written from the formats' definitions.

A `SourceFile` knows its content on disk and the documents that a reader must find in it. Writers are the
standard library's, pyarrow's and the tests' own; nothing here comes from the package.
"""

import bz2
import gzip
import io
import json
import lzma
import random
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from backports import zstd

COMPRESS = {"": bytes, "gzip": gzip.compress, "Zstandard": zstd.compress, "xz": lzma.compress,
            "bzip2": bz2.compress}
ENDINGS = {"": "", "gzip": ".gz", "Zstandard": ".zst", "xz": ".xz", "bzip2": ".bz2"}
MARKS = {"utf-8": b"\xef\xbb\xbf", "utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff",
         "utf-32-le": b"\xff\xfe\0\0", "utf-32-be": b"\0\0\xfe\xff"}
SURROGATE, REPLACED = "\ud83d", "\ufffd"


@dataclass(frozen=True)
class SourceFile:
    """A file below data.path.

    Args:
        path: where it lies, below the root.
        elsewhere: another place that says the same about domain and split.
        content: on disk; None for a link that leads nowhere.
        side: train, valid or test, by the split that it belongs to.
        reason: why it is left out; empty where it is read.
        format: how it is read, one of text, JSON, CSV, TSV and Parquet.
        compression: as the account names it.
        suffix: the domain of documents that name none, where no folder does; empty once the file is placed.
        documents: (domain, text as UTF-8) of those that are not empty; domain None: that of the file.
        empty: documents without a byte.
        undecodable: bytes that are no characters.
    """

    path: str
    content: bytes | None
    elsewhere: str = ""
    side: str = "train"
    reason: str = ""
    format: str = ""
    compression: str = ""
    suffix: str = ""
    documents: tuple[tuple[str | None, bytes], ...] = ()
    empty: int = 0
    undecodable: int = 0


@dataclass(frozen=True)
class Record:
    """A row or object: text None is null; domain None is null or absent."""

    text: str | None
    domain: str | None


@dataclass(frozen=True)
class Keys:
    """Where text and domain stand in records.

    Args:
        text: key of the text, or None.
        domain: key of the domain, or None.
        nested: a dotted key is a path, else it is written as it is.
    """

    text: str | None = "text"
    domain: str | None = "domain"
    nested: bool = True

    def object(self, record: Record, chance: random.Random) -> dict[str, Any]:
        """Write a record as an object of JSON, with other keys around it."""
        made: dict[str, Any] = {}
        values = [(self.text or "text", record.text), (self.domain or "domain", record.domain)]
        others: list[tuple[str, Any]] = [("id", 7), ("url", "http://x/{y}"), ("nothing", None),
                                         ("list", [1, {"text": "not this"}])]
        if self.text not in (None, "text"):
            others.append(("text", "a key that nobody named"))
        chosen = values + chance.sample(others, chance.randint(0, 3))
        chance.shuffle(chosen)
        for key, value in chosen:
            if (key, value) == (self.domain or "domain", None) and chance.random() < 0.5:
                continue                                             # absent instead of null
            place, last = made, key
            if self.nested and "." in key:
                first, last = key.split(".")
                place = made.setdefault(first, {"other": "text"})
            place[last] = value
        return made


def json_file(records: Sequence[Record], keys: Keys, chance: random.Random) -> tuple[str, bool]:
    """JSON lines, an array or objects over several lines; and whether all of it is ASCII, with escapes."""
    ascii_only = chance.random() < 0.5 or any(SURROGATE in (record.text or "") for record in records)
    objects = [keys.object(record, chance) for record in records]
    kind = chance.choice(["lines", "lines", "array", "objects"])
    if kind == "array":
        return json.dumps(objects, ensure_ascii=ascii_only, indent=chance.choice([None, None, 2])), ascii_only
    line = chance.choice(["\n", "\n", "\r\n"])
    indent = 2 if kind == "objects" else None
    written = [json.dumps(one, ensure_ascii=ascii_only, indent=indent).replace("\n", line) for one in objects]
    gaps = [line * chance.choice([1, 1, 1, 2]) for _ in written]
    gaps[-1] = chance.choice(["", line])
    return "".join(one + gap for one, gap in zip(written, gaps, strict=True)), ascii_only


def table_file(records: Sequence[Record], keys: Keys, delimiter: str, chance: random.Random) -> str:
    """A header and rows, quoted as RFC 4180 says: where a cell needs it, or everywhere."""
    columns = [keys.text or "text", *(() if keys.domain is None else (keys.domain,)), "n"]
    chance.shuffle(columns)
    everywhere, line = chance.random() < 0.3, chance.choice(["\n", "\r\n"])

    def cell(value: str) -> str:
        needed = any(sign in value for sign in (delimiter, '"', "\r", "\n"))
        return '"' + value.replace('"', '""') + '"' if needed or everywhere else value

    rows = [columns]
    for number, record in enumerate(records):
        cells = {keys.text or "text": record.text or "", "n": str(number)}
        if keys.domain is not None:
            cells[keys.domain] = record.domain or ""
        rows.append([cells[column] for column in columns])
    return line.join(delimiter.join(map(cell, row)) for row in rows) + chance.choice(["", line])


def parquet_file(records: Sequence[Record], keys: Keys, chance: random.Random) -> bytes:
    """Row groups of two, in a compression and with a type of strings of the format's own."""
    import pyarrow
    import pyarrow.parquet

    kind = chance.choice([pyarrow.string(), pyarrow.large_string()])
    columns: dict[str, Any] = {"n": pyarrow.array(range(len(records)))}
    values = {keys.text or "text": [record.text for record in records]}
    if keys.domain is not None:
        values[keys.domain] = [record.domain for record in records]
    structs: dict[str, dict[str, list[str | None]]] = {}
    for key, column in values.items():
        if keys.nested and "." in key:
            first, last = key.split(".")
            structs.setdefault(first, {})[last] = column
        else:
            columns[key] = pyarrow.array(column, kind)
    for first, fields in structs.items():
        rows = zip(*fields.values(), strict=True)
        columns[first] = pyarrow.array([dict(zip(fields, row, strict=True)) for row in rows])
    file = io.BytesIO()
    pyarrow.parquet.write_table(
        pyarrow.table(columns), file, row_group_size=2, use_dictionary=chance.random() < 0.5,
        compression=chance.choice(["none", "snappy", "zstd"]))
    return file.getvalue()


def expected(records: Sequence[Record],
             keys: Keys) -> tuple[tuple[tuple[str | None, bytes], ...], int, int]:
    """Documents, empty ones and undecodable bytes that a reader must find in records."""
    documents = tuple(((keys.domain and record.domain) or None,
                       record.text.replace(SURROGATE, REPLACED).encode())
                      for record in records if record.text)
    undecodable = sum(3 * (record.text or "").count(SURROGATE) for record in records)
    return documents, len(records) - len(documents), undecodable


def no_text(kind: str) -> bytes:
    """Content of a file that is no text, large enough to be sure."""
    file = io.BytesIO()
    match kind:
        case "zip":
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr("a.txt", "text in an archive " * 9)
        case "tar.gz":
            with tarfile.open(fileobj=file, mode="w:gz") as archive:
                entry = tarfile.TarInfo("a.txt")
                entry.size = 90
                archive.addfile(entry, io.BytesIO(b"text " * 18))
        case "npy":
            np.save(file, np.arange(300, dtype=np.float32))
        case "png":
            file.write(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4)
        case "numbers":
            file.write(np.arange(1000, dtype="<i4").tobytes())
        case "latin-1":
            file.write("für Übung, schön\n".encode("latin-1") * 9)
        case "utf-16":
            file.write(("text without a mark\n" * 9).encode("utf-16-le"))
    return file.getvalue()


NO_TEXT = ("zip", "tar.gz", "npy", "png", "numbers", "latin-1", "utf-16")
