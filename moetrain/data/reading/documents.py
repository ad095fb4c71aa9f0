"""Documents of a corpus: texts with a domain that stay on disk until they are needed.

A corpus has millions of them, so their attributes are columns: 56 bytes a document, 24 more for a part of
one.
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
    """A text that was read once and can be read again.

    Args:
        domain: name of its domain.
        digest: sha256 of the text.
        size: bytes of the text.
        file: the file that holds exactly this text; None if it is in the spool.
        start: byte in the spool at which it begins.
    """

    domain: str
    digest: bytes
    size: int
    file: Path | None
    start: int = 0

    def blocks(self, spool: Spool) -> Iterator[bytes]:
        """Read the text again in the blocks of `text_blocks.blocks_of`. DataError if it has changed."""
        return (spool.blocks(self.start, self.size) if self.file is None
                else _file_again(self.file, self.digest))


def spooled_document(domain: str, text: bytes, spool: Spool) -> Document:
    """A document from text in memory, which moves to the spool."""
    return Document(domain, hashlib.sha256(text).digest(), len(text), None, spool.append(text))


class Documents:
    """Columns of documents in the order in which they were read.

    The properties are views of the columns: nothing may be appended once one of them was read.

    Args:
        spool: holds the texts of documents without a file.
    """

    def __init__(self, spool: Spool) -> None:
        self.spool = spool
        self.names: list[str] = []                           # of domains, in order of appearance
        self._numbers: dict[str, int] = {}
        self._files: list[str] = []
        self._domains, self._digests, self._sizes = array("i"), bytearray(), array("q")
        self._places = array("q")                            # byte in the spool, or -1 - index of the file

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
        """int32 [documents], index of the domain in `names`."""
        return np.frombuffer(self._domains, np.int32) if self._domains else np.zeros(0, np.int32)

    @cached_property
    def digests(self) -> np.ndarray:
        """S32 [documents], sha256 of each. NumPy orders them like bytes, zeros at the end included."""
        return np.frombuffer(self._digests, "S32") if self._digests else np.zeros(0, "S32")

    @cached_property
    def sizes(self) -> np.ndarray:
        """int64 [documents], bytes of each text."""
        return np.frombuffer(self._sizes, np.int64) if self._sizes else np.zeros(0, np.int64)

    def whole(self, rows: np.ndarray) -> "Parts":
        """These documents, each with all of its bytes."""
        return Parts(self, rows, np.zeros_like(rows), self.sizes[rows])


class Part(NamedTuple):
    """Bytes `start` to `end` of a document.

    Both are moved back to the start of a character when the text is read.
    """

    document: Document
    start: int
    end: int
    spool: Spool

    def blocks(self) -> Iterator[bytes]:
        """Read the bytes of the part, block by block."""
        place = 0
        for block in self.document.blocks(self.spool):
            first, last = (character_start(block, min(max(cut - place, 0), len(block)))
                           for cut in (self.start, self.end))
            if first < last:
                yield block[first:last]
            place += len(block)


@dataclass(frozen=True)
class Parts:
    """Parts of documents, in an order.

    Args:
        documents: the columns that `rows` points into.
        rows: int64 [parts], index of the document.
        starts: int64 [parts], first byte in the document.
        ends: int64 [parts], byte behind the last one.
    """

    documents: Documents
    rows: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Part]:
        return self.starting_at(0)

    def starting_at(self, first: int) -> Iterator[Part]:
        """The parts from index `first` on."""
        for row in range(first, len(self)):
            yield Part(self.documents[self.rows[row]], int(self.starts[row]), int(self.ends[row]),
                       self.documents.spool)

    def at(self, which: np.ndarray) -> "Parts":
        """The parts at some indices, or where a mask is set."""
        return Parts(self.documents, self.rows[which], self.starts[which], self.ends[which])

    @property
    def sizes(self) -> np.ndarray:
        """int64 [parts], bytes of each."""
        return self.ends - self.starts

    @property
    def bytes(self) -> int:
        return int(self.sizes.sum())

    @property
    def domains(self) -> np.ndarray:
        """int32 [parts], index of the domain in `documents.names`."""
        return self.documents.domains[self.rows]

    @property
    def digests(self) -> np.ndarray:
        return self.documents.digests[self.rows]

    def by_domain(self) -> dict[str, tuple[int, int]]:
        """Number of parts and their bytes for every domain that has one, sorted by name."""
        names, domains = self.documents.names, self.domains
        counts, sizes = np.bincount(domains, minlength=len(names)), np.zeros(len(names), np.int64)
        np.add.at(sizes, domains, self.sizes)
        return dict(sorted((names[number], (int(counts[number]), int(sizes[number])))
                           for number in np.flatnonzero(counts)))


def _file_again(path: Path, digest: bytes) -> Iterator[bytes]:
    """Read the text of a file again, and compare its hash after the last block."""
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
