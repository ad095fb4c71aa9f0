"""The account of a corpus: two ledgers that say what lies at its path and what became of it.

- **Files**, in bytes on disk. Every regular file at the path is read, listed with its format and compression,
  or left out for a reason. The two sums add up to what lies there.
- **Text**, in bytes of UTF-8. The text of the files that were read is trained on, held out, a duplicate or
  cut off. These sums add up as well.

A reader receives the `FileEntry` of its file and fills in format, compression, undecodable bytes and empty
texts; it raises `NotText` for a file that it does not read. `corpus/sources.py` counts documents and their
bytes, `corpus/scan.py` adds the files that are never opened.

`dataset.json` keeps an account as `Account.record` returns it: lists, strings and integers only.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

# Reasons for leaving a file out. `BINARY` goes with the name of the format.
HIDDEN, OWN, EMPTY = "hidden", "own output", "empty"
TEST, VALID = "test split", "validation split"          # VALID: left out only where data.held_out is set
HELD_OUT = "data.held_out"                              # read by that key instead
NO_FILE = "no file"                                     # pipes, devices, links to nowhere: they have no bytes
BINARY = "not text"
UNDECODABLE = "undecodable"                             # parts of files that are read
# Any other reason may be a mistake.
INTENDED = frozenset((HIDDEN, OWN, EMPTY, TEST, VALID, HELD_OUT, NO_FILE))

TRAINED, HELD = "trained on", "held out"                # the two sides of a split
# Other fates of text.
DUPLICATES, ALSO_HELD_OUT = "duplicates", "also in the held-out text"
CAPPED, CUT = "cut by data.domain_cap", "cut from held-out texts"
TEXT = (TRAINED, HELD, DUPLICATES, ALSO_HELD_OUT, CAPPED, CUT)


class NotText(Exception):
    """A file is not read as text.

    Args:
        format: what the file is, as a noun with its article: "a tar archive", "binary".
        offset: byte at which the format shows.
        why: the reason, a sentence without its full stop.
        convert: command or advice that makes the text readable; empty where none is known.
    """

    def __init__(self, format: str, *, offset: int = 0, why: str, convert: str = "") -> None:
        super().__init__(format, offset, why, convert)
        self.format, self.offset, self.why, self.convert = format, offset, why, convert


@dataclass(slots=True)
class FileEntry:
    """One file of the ledger: read, unless `reason` says why it is left out."""

    name: str                       # relative to the path that the user gave
    size: int                       # bytes on disk
    side: str = TRAINED             # HELD: of data.held_out, or of a validation split beside the text
    reason: str = ""
    format: str = ""                # of a file that is read: "text", "JSON lines", …; else what it is instead
    compression: str = ""           # "gzip", …
    convert: str = ""               # of a file that is left out: command or advice that makes it readable
    documents: int = 0              # texts that are not empty
    text: int = 0                   # their bytes, as UTF-8
    empty: int = 0                  # texts without a byte
    undecodable: int = 0            # invalid bytes, kept or replaced; a lone surrogate in JSON is three

    def leave_out(self, reason: str, *, format: str = "", convert: str = "") -> None:
        """Mark the file as not read after all and discard the counts of its text."""
        self.reason, self.format, self.convert = reason, format, convert
        self.documents = self.text = self.empty = self.undecodable = 0


class Tally(NamedTuple):
    """A number of documents (or parts of them) and their bytes."""

    count: int = 0
    bytes: int = 0


class FileLedger:
    """Every file at the path of one config key, in the order of `add`.

    Args:
        key: the config key that names the path, such as `data.path`.
        path: the path as the user gave it.
    """

    def __init__(self, key: str, path: str) -> None:
        self.key, self.path = key, path
        self.entries: list[FileEntry] = []
        self.splits: dict[str, list[FileEntry]] = {}         # files of the splits found there, by role

    def add(self, name: str, size: int, reason: str = "") -> FileEntry:
        """Enter a file of `size` bytes. `reason` is why it is left out; empty means that it is read."""
        entry = FileEntry(name, size, reason=reason)
        self.entries.append(entry)
        return entry

    @property
    def read(self) -> list[FileEntry]:
        """Files that are read."""
        return [entry for entry in self.entries if not entry.reason]

    @property
    def left_out(self) -> list[FileEntry]:
        """Files that are left out, each with its reason."""
        return [entry for entry in self.entries if entry.reason]

    def mistakes(self) -> list[dict[str, Any]]:
        """Rows for what the user may have meant to be read, the largest first; undecodable bytes count."""
        rows = _sums([entry for entry in self.left_out if entry.reason not in INTENDED], ("reason", "format"))
        marred = [entry for entry in self.read if entry.undecodable]
        rows += [{"reason": UNDECODABLE, "format": "", **row} for row in _sums(marred, (), _lost)]
        return sorted(rows, key=lambda row: -row["bytes"])

    def refreshed(self, kept: dict[str, Any]) -> dict[str, Any]:
        """Update a kept record for files that have not changed since.

        Files that were read, or left out after a look at their content, keep their rows. Files that are left
        out without being opened are counted as they lie there now.
        """
        rows = [row for row in kept["left_out"] if row["reason"] not in INTENDED]
        rows += _sums([entry for entry in self.entries if entry.reason in INTENDED], ("reason", "format"))
        rows.sort(key=lambda row: (-row["bytes"], row["reason"], row["format"]))
        return {**kept, **_tally(self.entries), "left_out": rows}

    def record(self) -> dict[str, Any]:
        """The ledger as `dataset.json` keeps it: sums over files with common fields, the largest first."""
        splits = {role: _sums(members, ())[0] for role, members in sorted(self.splits.items())}
        return {"path": writable_name(self.path), **_tally(self.entries),
                "read": _sums(self.read, ("side", "format", "compression")),
                "left_out": _sums(self.left_out, ("reason", "format")), "splits": splits}


@dataclass
class Account:
    """Both ledgers of one preparation. `text` maps each fate in `TEXT` to its documents and bytes."""

    files: list[FileLedger] = field(default_factory=list)
    text: dict[str, Tally] = field(default_factory=dict)

    def note(self, what: str, sizes: Sequence[int] | np.ndarray) -> None:
        """Add documents, or parts of documents, to one fate of the text.

        Args:
            what: the fate, one of `TEXT`.
            sizes: bytes of each document or part.
        """
        assert what in TEXT, what
        if len(sizes):
            before = self.text.get(what, Tally())
            self.text[what] = Tally(before.count + len(sizes), before.bytes + int(np.sum(sizes)))

    def settle(self, trained: dict[str, int], held: dict[str, int], rest: str) -> None:
        """Replace the planned sizes of the two sides by what was written.

        The writer moves each cut to the start of a character, so the bytes written differ from the plan by a
        few.

        Args:
            trained: `documents` and `bytes` written to the training split.
            held: the same of the held-out split.
            rest: the fate in `TEXT` that receives the difference in bytes.
        """
        planned = sum(self.text.get(side, Tally()).bytes for side in (TRAINED, HELD))
        for side, counts in ((TRAINED, trained), (HELD, held)):
            self.text[side] = Tally(counts["documents"], counts["bytes"])
        if moved := planned - trained["bytes"] - held["bytes"]:
            before = self.text.get(rest, Tally())
            self.text[rest] = Tally(before.count, before.bytes + moved)

    def record(self) -> dict[str, Any]:
        """The account as `dataset.json` keeps it. Asserts that the sums of the text ledger match."""
        read = [entry for ledger in self.files for entry in ledger.read]
        held = {"documents": sum(entry.documents for entry in read),
                "bytes": sum(entry.text for entry in read)}
        became = {what: {"documents": tally.count, "bytes": tally.bytes}
                  for what in TEXT if (tally := self.text.get(what)) is not None}
        assert held["bytes"] == sum(tally["bytes"] for tally in became.values()), (held, became)
        marred = sorted((entry for entry in read if entry.undecodable),
                        key=lambda entry: (-entry.undecodable, entry.name))
        undecodable = {"files": len(marred), "bytes": sum(entry.undecodable for entry in marred),
                       "first": writable_name(marred[0].name) if marred else ""}
        return {"files": {ledger.key: ledger.record() for ledger in self.files},
                "text": {**held, "became": became, "empty": sum(entry.empty for entry in read),
                         "undecodable": undecodable}}


def writable_name(name: str) -> str:
    """A file name that can be written as UTF-8: other bytes are escaped with backslashes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def left_out_by_mistake(ledgers: Iterable[FileLedger]) -> tuple[int, int]:
    """Count bytes that may have been left out by mistake. Undecodable bytes count.

    Returns:
        Bytes left out that may be meant to be read, and bytes of all files that may be meant to be read.
    """
    entries = [entry for ledger in ledgers for entry in ledger.entries if entry.reason not in INTENDED]
    return sum(map(_lost, entries)), sum(entry.size for entry in entries)


def _lost(entry: FileEntry) -> int:
    """Bytes of a file on disk that are not read.

    Of a file that is read it is the undecodable share of its size, because the text of a compressed file may
    be larger than the file.
    """
    return (entry.size if entry.reason
            else entry.size * entry.undecodable // max(entry.text, entry.undecodable, 1))


def _size(entry: FileEntry) -> int:
    return entry.size


def _sums(entries: list[FileEntry], fields: tuple[str, ...],
          size: Callable[[FileEntry], int] = _size) -> list[dict[str, Any]]:
    """Rows of files, bytes and a first name, one for each combination of `fields`, the largest first."""
    groups: dict[tuple[str, ...], list[FileEntry]] = {}
    for entry in entries:
        groups.setdefault(tuple(getattr(entry, name) for name in fields), []).append(entry)
    rows = []
    for values, members in groups.items():
        first = min(members, key=lambda entry: entry.name)
        convert = {"convert": writable_name(first.convert)} if first.convert else {}
        rows.append({**dict(zip(fields, values)), **_tally(members, size), "first": writable_name(first.name),
                     **convert})
    return sorted(rows, key=lambda row: (-row["bytes"], *(row[name] for name in fields)))


def _tally(entries: list[FileEntry], size: Callable[[FileEntry], int] = _size) -> dict[str, int]:
    return {"files": len(entries), "bytes": sum(map(size, entries))}
