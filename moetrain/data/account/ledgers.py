"""The account of a corpus: what lies at its path, and what became of it. Nothing is missing from it.

Two ledgers. **Files**, in bytes on disk: every regular file at a path is read, by its format and compression, or left
out, for a reason; the two add up to what lies there. **Text**, in bytes of UTF-8: what the files that were read hold is
trained on, held out, a duplicate or cut off; these add up as well.

A reader is handed the `FileEntry` of its file and fills it in: format, compression, undecodable bytes, empty texts. A
file that it does not read raises `NotText`. `sources.documents` counts documents and their bytes, `scan` adds what is
never opened.

An account that is kept (`dataset.json`) is what `Account.record` gives: lists, texts and integers alone.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

# Why a file is left out. A format is named beside `BINARY`.
HIDDEN, OWN, EMPTY = "hidden", "own output", "empty"
TEST, VALID = "test split", "validation split"          # VALID: only where data.held_out names another one
HELD_OUT = "data.held_out"                              # read by that key
NO_FILE = "no file"                                     # pipes, devices, links to nowhere: they have no bytes
BINARY = "not text"
UNDECODABLE = "undecodable"                             # parts of files that are read
INTENDED = frozenset((HIDDEN, OWN, EMPTY, TEST, VALID, HELD_OUT, NO_FILE))  # everything else may be a mistake

TRAINED, HELD = "trained on", "held out"                # the two sides
# What else becomes of text.
DUPLICATES, ALSO_HELD_OUT = "duplicates", "also in the held-out text"
CAPPED, CUT = "cut by data.domain_cap", "cut from held-out texts"
TEXT = (TRAINED, HELD, DUPLICATES, ALSO_HELD_OUT, CAPPED, CUT)


class NotText(Exception):
    """A file is not read as text.

    Args:
        format: what it is, as a noun with its article: "a tar archive", "binary".
        offset: the byte that shows it.
        why: a sentence without its end.
        convert: what to type, or do, so that its text can be read; nothing where nobody knows.
    """

    def __init__(self, format: str, *, offset: int = 0, why: str, convert: str = "") -> None:
        super().__init__(format, offset, why, convert)
        self.format, self.offset, self.why, self.convert = format, offset, why, convert


@dataclass(slots=True)
class FileEntry:
    """A file: read unless `reason` says why not."""

    name: str                       # relative to the path that the user gave
    size: int                       # bytes on disk
    side: str = TRAINED  # HELD: of data.held_out, or of a validation split that lies beside the training text
    reason: str = ""
    format: str = ""                # of what was read: "text", "JSON lines", …; of what was not: what it is
    compression: str = ""           # "gzip", …
    convert: str = ""               # of a file that was left out: what to type so that it can be read
    documents: int = 0              # texts that are not empty
    text: int = 0                   # their bytes, as UTF-8
    empty: int = 0                  # texts without a byte
    undecodable: int = 0  # bytes that are no characters, kept or replaced; a lone surrogate of JSON is three

    def leave_out(self, reason: str, *, format: str = "", convert: str = "") -> None:
        """The file is not read after all: what was counted of its text is nothing."""
        self.reason, self.format, self.convert = reason, format, convert
        self.documents = self.text = self.empty = self.undecodable = 0


class Tally(NamedTuple):
    count: int = 0
    bytes: int = 0


class FileLedger:
    """Every file at the path of one key, in the order in which they were added."""

    def __init__(self, key: str, path: str) -> None:
        self.key, self.path = key, path
        self.entries: list[FileEntry] = []
        self.splits: dict[str, list[FileEntry]] = {}         # that lie there, by what they are for

    def add(self, name: str, size: int, reason: str = "") -> FileEntry:
        entry = FileEntry(name, size, reason=reason)
        self.entries.append(entry)
        return entry

    @property
    def read(self) -> list[FileEntry]:
        return [entry for entry in self.entries if not entry.reason]

    @property
    def left_out(self) -> list[FileEntry]:
        return [entry for entry in self.entries if entry.reason]

    def mistakes(self) -> list[dict[str, Any]]:
        """Sums of what may be meant to be read, the largest first."""
        rows = _sums([entry for entry in self.left_out if entry.reason not in INTENDED], ("reason", "format"))
        marred = [entry for entry in self.read if entry.undecodable]
        rows += [{"reason": UNDECODABLE, "format": "", **row} for row in _sums(marred, (), _lost)]
        return sorted(rows, key=lambda row: -row["bytes"])

    def refreshed(self, kept: dict[str, Any]) -> dict[str, Any]:
        """The kept record of files that have not changed since, with what is left out unread as it lies there now."""
        rows = [row for row in kept["left_out"] if row["reason"] not in INTENDED]
        rows += _sums([entry for entry in self.entries if entry.reason in INTENDED], ("reason", "format"))
        rows.sort(key=lambda row: (-row["bytes"], row["reason"], row["format"]))
        return {**kept, **_tally(self.entries), "left_out": rows}

    def record(self) -> dict[str, Any]:
        """The ledger as it is kept: sums by what files have in common, the largest first."""
        splits = {role: _sums(members, ())[0] for role, members in sorted(self.splits.items())}
        return {"path": plain(self.path), **_tally(self.entries),
                "read": _sums(self.read, ("side", "format", "compression")),
                "left_out": _sums(self.left_out, ("reason", "format")), "splits": splits}


@dataclass
class Account:
    """Both ledgers of one preparation. text: what became of the documents, by `TEXT`."""

    files: list[FileLedger] = field(default_factory=list)
    text: dict[str, Tally] = field(default_factory=dict)

    def note(self, what: str, sizes: Sequence[int] | np.ndarray) -> None:
        """Documents, or parts of documents, of which the same became. what: one of `TEXT`; sizes: bytes of each."""
        assert what in TEXT, what
        if len(sizes):
            before = self.text.get(what, Tally())
            self.text[what] = Tally(before.count + len(sizes), before.bytes + int(np.sum(sizes)))

    def settle(self, trained: dict[str, int], held: dict[str, int], rest: str) -> None:
        """Take the two sides as they were written. Cuts move to the start of a character: `rest` has what lies between.

        trained, held: `documents` and `bytes`.
        """
        planned = sum(self.text.get(side, Tally()).bytes for side in (TRAINED, HELD))
        for side, counts in ((TRAINED, trained), (HELD, held)):
            self.text[side] = Tally(counts["documents"], counts["bytes"])
        if moved := planned - trained["bytes"] - held["bytes"]:
            before = self.text.get(rest, Tally())
            self.text[rest] = Tally(before.count, before.bytes + moved)

    def record(self) -> dict[str, Any]:
        """The account as it is kept, checked: its sums are right or this is a bug."""
        read = [entry for ledger in self.files for entry in ledger.read]
        held = {"documents": sum(entry.documents for entry in read),
                "bytes": sum(entry.text for entry in read)}
        became = {what: {"documents": tally.count, "bytes": tally.bytes}
                  for what in TEXT if (tally := self.text.get(what)) is not None}
        assert held["bytes"] == sum(tally["bytes"] for tally in became.values()), (held, became)
        marred = sorted((entry for entry in read if entry.undecodable),
                        key=lambda entry: (-entry.undecodable, entry.name))
        undecodable = {"files": len(marred), "bytes": sum(entry.undecodable for entry in marred),
                       "first": plain(marred[0].name) if marred else ""}
        return {"files": {ledger.key: ledger.record() for ledger in self.files},
                "text": {**held, "became": became, "empty": sum(entry.empty for entry in read),
                         "undecodable": undecodable}}


def plain(name: str) -> str:
    """A name as text that can be written: bytes that are not UTF-8 are escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def by_mistake(ledgers: Iterable[FileLedger]) -> tuple[int, int]:
    """(bytes left out that may be meant to be read, bytes of all files that may be). Undecodable bytes count."""
    entries = [entry for ledger in ledgers for entry in ledger.entries if entry.reason not in INTENDED]
    return sum(map(_lost, entries)), sum(entry.size for entry in entries)


def _lost(entry: FileEntry) -> int:
    """Bytes of a file that are not read. Of a compressed one the undecodable share: its text may be larger than the file."""
    return (entry.size if entry.reason
            else entry.size * entry.undecodable // max(entry.text, entry.undecodable, 1))


def _size(entry: FileEntry) -> int:
    return entry.size


def _sums(entries: list[FileEntry], fields: tuple[str, ...],
          size: Callable[[FileEntry], int] = _size) -> list[dict[str, Any]]:
    groups: dict[tuple[str, ...], list[FileEntry]] = {}
    for entry in entries:
        groups.setdefault(tuple(getattr(entry, name) for name in fields), []).append(entry)
    rows = []
    for values, members in groups.items():
        first = min(members, key=lambda entry: entry.name)
        convert = {"convert": plain(first.convert)} if first.convert else {}
        rows.append({**dict(zip(fields, values)), **_tally(members, size), "first": plain(first.name),
                     **convert})
    return sorted(rows, key=lambda row: (-row["bytes"], *(row[name] for name in fields)))


def _tally(entries: list[FileEntry], size: Callable[[FileEntry], int] = _size) -> dict[str, int]:
    return {"files": len(entries), "bytes": sum(map(size, entries))}
