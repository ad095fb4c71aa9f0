"""Documents: texts with a domain, which stay on disk until they are asked for.

A corpus has millions of them, so what is known of each lies in columns: 56 bytes a document, 24 more for a part of one.
"""

import codecs
import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moetrain.data.reading.spool import Spool
from moetrain.data.reading.text_blocks import blocks_of, character_start
from moetrain.errors import DataError
from moetrain.files import open_regular


class Document(NamedTuple):
    """A text that was read once. It is read again from its file, or where that is None, from the spool."""

    domain: str
    digest: bytes                   # sha256 of the text
    size: int                       # bytes
    file: Path | None
    start: int = 0                  # in the spool

    def blocks(self, spool: Spool) -> Iterator[bytes]:
        """The text again, as `data.text.blocks_of` gives it; DataError if it changed."""
        return (spool.blocks(self.start, self.size) if self.file is None
                else _file_again(self.file, self.digest))


def spooled_document(domain: str, text: bytes, spool: Spool) -> Document:
    """A document that is in memory and need not stay there."""
    return Document(domain, hashlib.sha256(text).digest(), len(text), None, spool.append(text))


class Documents:
    """Documents in the order in which they were read. Columns are views: nothing may be appended once one was taken.

    Args:
        spool: keeps the texts that have no file.
    """

    def __init__(self, spool: Spool) -> None:
        self.spool = spool
        self.names: list[str] = []                           # of domains, in the order in which they came
        self._numbers: dict[str, int] = {}
        self._files: list[str] = []
        self._domains, self._digests, self._sizes = array("i"), bytearray(), array("q")
        self._places = array("q")                            # in the spool, or −1 − the number of a file

    def append(self, document: Document) -> None:
        if document.domain not in self._numbers:
            self._numbers[document.domain] = len(self.names)
            self.names.append(document.domain)
        self._domains.append(self._numbers[document.domain])
        self._digests += document.digest
        self._sizes.append(document.size)
        if document.file is not None:
            self._files.append(str(document.file))
        self._places.append(document.start if document.file is None else -len(self._files))

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, row: int) -> Document:
        place = self._places[row]
        return Document(self.names[self._domains[row]], bytes(self._digests[32 * row:32 * row + 32]),
                        self._sizes[row], Path(self._files[-1 - place]) if place < 0 else None, max(place, 0))

    @cached_property
    def domains(self) -> np.ndarray:
        """int32 number of the domain of each, as `names` lists them."""
        return np.frombuffer(self._domains, np.int32) if self._domains else np.zeros(0, np.int32)

    @cached_property
    def digests(self) -> np.ndarray:
        """sha256 of each, as numpy's texts of 32 bytes: they are ordered as bytes are, and zeros at the end count."""
        return np.frombuffer(self._digests, "S32") if self._digests else np.zeros(0, "S32")

    @cached_property
    def sizes(self) -> np.ndarray:
        """int64 bytes of each."""
        return np.frombuffer(self._sizes, np.int64) if self._sizes else np.zeros(0, np.int64)

    def whole(self, rows: np.ndarray) -> "Parts":
        """All bytes of these documents."""
        return Parts(self, rows, np.zeros_like(rows), self.sizes[rows])


class Part(NamedTuple):
    """Bytes start to end of a document, each moved back to the start of a character."""

    document: Document
    start: int
    end: int
    spool: Spool

    def blocks(self) -> Iterator[bytes]:
        place = 0
        for block in self.document.blocks(self.spool):
            first, last = (character_start(block, min(max(cut - place, 0), len(block)))
                           for cut in (self.start, self.end))
            if first < last:
                yield block[first:last]
            place += len(block)


@dataclass(frozen=True)
class Parts:
    """Parts of documents, in an order. rows: which documents; starts, ends: bytes of each. All are int64."""

    documents: Documents
    rows: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Part]:
        return self.starting_at(0)

    def starting_at(self, first: int) -> Iterator[Part]:
        """Those from number `first` on."""
        for row in range(first, len(self)):
            yield Part(self.documents[self.rows[row]], int(self.starts[row]), int(self.ends[row]),
                       self.documents.spool)

    def at(self, which: np.ndarray) -> "Parts":
        """Those at some places, or where a mask is set."""
        return Parts(self.documents, self.rows[which], self.starts[which], self.ends[which])

    @property
    def sizes(self) -> np.ndarray:
        """int64 bytes of each."""
        return self.ends - self.starts

    @property
    def bytes(self) -> int:
        return int(self.sizes.sum())

    @property
    def domains(self) -> np.ndarray:
        """int32 number of the domain of each, as `documents.names` lists them."""
        return self.documents.domains[self.rows]

    @property
    def digests(self) -> np.ndarray:
        return self.documents.digests[self.rows]

    def by_domain(self) -> dict[str, tuple[int, int]]:
        """(parts, their bytes) of every domain that has one, sorted by name."""
        names, domains = self.documents.names, self.domains
        counts, sizes = np.bincount(domains, minlength=len(names)), np.zeros(len(names), np.int64)
        np.add.at(sizes, domains, self.sizes)
        return dict(sorted((names[number], (int(counts[number]), int(sizes[number])))
                           for number in np.flatnonzero(counts)))


def _file_again(path: Path, digest: bytes) -> Iterator[bytes]:
    found = hashlib.sha256()
    try:
        with open_regular(path) as file:
            for number, block in enumerate(blocks_of(file.read)):
                block = block if number else block.removeprefix(codecs.BOM_UTF8)
                if block:
                    found.update(block)
                    yield block
    except OSError as error:
        raise _changed(path) from error
    if found.digest() != digest:
        raise _changed(path)


def _changed(path: Path) -> DataError:
    return DataError(34, "a text changed while it was read", where=str(path),
                     why="its content is not what the first pass saw",
                     next="run again when nothing writes to the file")
