"""Which text is trained on and which is held out, as a pure function of the documents' contents.

Exact duplicates go first, so that no text is on both sides. A document whose hash is 0 modulo 20 is held out. Two
exceptions keep every domain measurable: fewer than 20 documents in all give up their last twentieth each, and a domain
that the hash leaves without held-out text gives its document of smallest hash, or the last twentieth of its only one.

`Overlap` measures what exact duplicates miss: the share of 32-byte windows of held-out text, at a stride of 16, that
also occur anywhere in the training text.
"""

from collections.abc import Iterable
from itertools import groupby
from typing import NamedTuple

import numpy as np

from moetrain.data.sources import Document

HELDOUT_ONE_IN = 20
MIN_TO_CUT = 640                # bytes; a shorter document is not cut
WINDOW, STRIDE = 32, 16


class Part(NamedTuple):
    """Bytes start to end of a document."""

    document: Document
    start: int
    end: int

    def read(self) -> bytes:
        text = self.document.read()
        return text[_boundary(text, self.start):_boundary(text, self.end)]


class Split(NamedTuple):
    train: list[Part]
    heldout: list[Part]


def unique(documents: Iterable[Document]) -> list[Document]:
    """Sorted by domain and content, each content once: the order in which they came is forgotten."""
    seen: set[bytes] = set()
    ordered = sorted(documents, key=lambda document: (document.domain, document.digest))
    return [document for document in ordered if not (document.digest in seen or seen.add(document.digest))]


def cap_domains(documents: list[Document], cap: int | None) -> list[Document]:
    """The first `cap` bytes of each domain; the last document taken is cut."""
    if cap is None:
        return documents
    taken, sizes = [], dict.fromkeys((document.domain for document in documents), 0)
    for document in documents:
        size = min(document.size, cap - sizes[document.domain])
        if size > 0:
            taken.append(document._replace(size=size))
            sizes[document.domain] += size
    return taken


def split(documents: list[Document], *, heldout_limit: int | None = None) -> Split:
    """Parts in the order of the documents. heldout_limit: bytes of a held-out document that are used."""
    result = Split([], [])
    few = len(documents) < HELDOUT_ONE_IN
    for _, group in groupby(documents, key=lambda document: document.domain):
        members = list(group)
        if few or len(members) == 1:
            _cut_each(members, result)
            continue
        chosen = _held_out(members)
        for document in members:
            if document.digest in chosen:
                result.heldout.append(Part(document, 0, min(document.size, heldout_limit or document.size)))
            else:
                result.train.append(Part(document, 0, document.size))
    return result


def _held_out(members: list[Document]) -> set[bytes]:
    """Digests of the held-out documents of a domain: never none, never all."""
    by_hash = sorted(document.digest for document in members)
    chosen = {digest for digest in by_hash if int.from_bytes(digest[:8]) % HELDOUT_ONE_IN == 0}
    chosen = chosen or {by_hash[0]}
    return chosen - {by_hash[-1]} if len(chosen) == len(members) else chosen


def _cut_each(members: list[Document], result: Split) -> None:
    for document in members:
        held = document.size // HELDOUT_ONE_IN if document.size >= MIN_TO_CUT else 0
        result.train.append(Part(document, 0, document.size - held))
        if held:
            result.heldout.append(Part(document, document.size - held, document.size))


def _boundary(text: bytes, position: int) -> int:
    """The nearest start of a UTF-8 character at or before a position."""
    while 0 < position < len(text) and text[position] & 0xC0 == 0x80:
        position -= 1
    return position


class Overlap:
    """Feed all held-out texts, then all training texts; `share` is the answer."""

    def __init__(self) -> None:
        self._pieces: list[np.ndarray] = []
        self._hashes = np.zeros(0, np.uint64)      # sorted; filled at the first training text
        self._marked = np.zeros(0, bool)           # by the upper bits of a hash: is one of ours there?
        self._found = np.zeros(0, bool)

    def add_heldout(self, text: bytes) -> None:
        self._pieces.append(_window_hashes(text)[::STRIDE])

    def add_train(self, text: bytes) -> None:
        if not len(self._marked):
            self._hashes = np.sort(np.concatenate([np.zeros(0, np.uint64), *self._pieces]))
            self._marked = np.zeros(1 << 24, bool)
            self._marked[_bucket(self._hashes)] = True
            self._found = np.zeros(len(self._hashes), bool)
        hashes = _window_hashes(text)
        hashes = np.unique(hashes[self._marked[_bucket(hashes)]])
        if len(hashes) and len(self._hashes):
            places = np.searchsorted(hashes, self._hashes).clip(max=len(hashes) - 1)
            self._found |= hashes[places] == self._hashes

    @property
    def share(self) -> float:
        return float(self._found.mean()) if len(self._found) else 0.0


def _bucket(hashes: np.ndarray) -> np.ndarray:
    return hashes >> np.uint64(40)


def _window_hashes(text: bytes) -> np.ndarray:
    """uint64 hash of every WINDOW bytes: h_2w[i] = h_w[i] * p^w + h_w[i + w], five doublings."""
    hashes = np.frombuffer(text, np.uint8).astype(np.uint64)
    power, width = 0x9E3779B97F4A7C15, 1
    while width < WINDOW:
        hashes = hashes[:-width] * np.uint64(power) + hashes[width:]
        power, width = power * power % (1 << 64), 2 * width
    hashes = hashes ^ (hashes >> np.uint64(31))
    return hashes * np.uint64(0xBF58476D1CE4E5B9)
