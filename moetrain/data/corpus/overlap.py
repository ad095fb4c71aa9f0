"""Share of held-out text that also occurs in the training text, beyond exact duplicates of documents.

Windows of WINDOW bytes of held-out text, one every STRIDE bytes, are looked up by hash among all windows of
the training text. Time grows with the text, memory with the number of windows looked up. Where held-out text
has more windows than the limit, every second or third ... is taken, and the share is an estimate.
"""

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np

WINDOW, STRIDE = 32, 16
_CHUNK = 1 << 14                # bytes hashed at once; the hashes fit the cache of a core
_GATHER = 1 << 16               # bytes of short training texts looked up together
_READ = 1 << 18                 # tokens read at once


class Share(NamedTuple):
    """Result of an overlap measurement.

    Args:
        value: share of the windows that were found.
        windows: windows of held-out text that were looked up.
        every: one window in so many was looked up.
    """

    value: float
    windows: int
    every: int


class Tokens(Protocol):
    """The part of `TokenStream` (preparation/prepared_dataset.py) that the measurement needs."""

    size: int
    document_starts: np.ndarray

    def read(self, start: int, length: int) -> np.ndarray: ...


def token_overlap(heldout: Tokens, train: Tokens, *, as_bytes: bool, limit: int) -> Share | None:
    """Overlap of texts given as tokens of one tokenizer. None if there is nothing to look up.

    Args:
        heldout: text whose windows are looked up.
        train: text in which they are looked up.
        as_bytes: whether an id below 256 is a byte. Otherwise a token counts as four bytes, so a window is
            eight tokens.
        limit: windows that are looked up at most.
    """
    measure = Overlap(heldout_bytes=heldout.size * (1 if as_bytes else 4), limit=limit)
    for start, end in pairwise([*heldout.document_starts.tolist(), heldout.size]):
        _exhaust(measure.heldout(_bytes_of(heldout, start, end, as_bytes)))
    _exhaust(measure.train(_bytes_of(train, 0, train.size, as_bytes)))
    return measure.share()


def _bytes_of(tokens: Tokens, start: int, end: int, as_bytes: bool) -> Iterator[bytes]:
    """Tokens `start` to `end` as bytes. The end id 256 of byte tokens becomes 0."""
    for place in range(start, end, _READ):
        yield tokens.read(place, min(_READ, end - place)).astype("u1" if as_bytes else "<u4").tobytes()


def _exhaust(blocks: Iterator[bytes]) -> None:
    for _ in blocks:
        pass


class Overlap:
    """Streaming measurement: feed all held-out texts, then all training texts, then read `share`.

    Args:
        heldout_bytes: bytes of all held-out texts.
        limit: windows of them that are looked up at most.
    """

    def __init__(self, *, heldout_bytes: int, limit: int) -> None:
        self._every = max(-(-heldout_bytes // (STRIDE * limit)), 1)
        self._pieces: list[np.ndarray] = []
        # Hashes of the noted windows, sorted, with counts; filled at the first look-up.
        self._hashes = self._counts = np.zeros(0, np.uint64)
        self._found = np.zeros(0, bool)
        # Two tables rule out most hashes before the binary search, which is slow.
        self._missing = np.zeros(0, np.uint8)        # by upper bits of a hash: windows not found yet
        self._seen = np.zeros(0, bool)               # by lower bits: whether there is a window
        self._shift = np.uint64(63)
        self._texts: list[bytes] = []                           # training texts not yet looked up
        self._waiting = 0

    def heldout(self, blocks: Iterable[bytes]) -> Iterator[bytes]:
        """Pass on the blocks of a held-out text and note its windows."""
        # `place` is the position of the first byte of `tail` in the text.
        tail, place, stride = b"", 0, STRIDE * self._every
        for block in blocks:
            text = tail + block
            for start, hashes in _hashes_of(_numbers(text)[:-1]):
                self._pieces.append(hashes[-(place + start) % stride::stride].copy())
            done = max(len(text) - WINDOW + 1, 0)
            tail, place = text[done:], place + done
            yield block

    def train(self, blocks: Iterable[bytes]) -> Iterator[bytes]:
        """Pass on the blocks of a training text and look for the noted windows in it."""
        tail = b""
        for block in blocks:
            self._texts.append(tail + block)
            self._waiting += len(block)
            tail = self._texts[-1][-WINDOW + 1:]
            if self._waiting >= _GATHER:
                self._look_up()
            yield block

    def share(self) -> Share | None:
        """Share of the noted windows that were found; None if none were noted."""
        self._look_up()
        windows = int(self._counts.sum())
        return (Share(int(self._counts[self._found].sum()) / windows, windows, self._every) if windows
                else None)

    def _look_up(self) -> None:
        if not len(self._missing):
            noted = np.concatenate([np.zeros(0, np.uint64), *self._pieces])
            self._hashes, self._counts = np.unique(noted, return_counts=True)
            self._pieces, self._found = [], np.zeros(len(self._hashes), bool)
            # A sparse table that fits a cache where possible.
            bits = min((16 * len(self._hashes)).bit_length(), 24)
            self._shift = np.uint64(64 - bits)
            buckets, missing = np.unique(self._hashes >> self._shift, return_counts=True)
            self._missing = np.zeros(1 << bits, np.uint8)
            self._missing[buckets] = missing.clip(max=255)
            self._seen = np.zeros(1 << bits, bool)
            self._seen[self._hashes & np.uint64(len(self._seen) - 1)] = True
        if len(self._hashes):
            for _, hashes in _hashes_of(_numbers(*self._texts)):
                buckets = (hashes >> self._shift).view(np.int64)         # np.take does not accept uint64
                hashes = hashes[self._missing.take(buckets, mode="clip") != 0]   # clip skips the bounds check
                self._mark(hashes[self._seen[hashes & np.uint64(len(self._seen) - 1)]])
        self._texts, self._waiting = [], 0

    def _mark(self, hashes: np.ndarray) -> None:
        """Mark the noted windows that have one of these hashes as found.

        A bucket whose windows are all found is not searched again.
        """
        places = np.searchsorted(self._hashes, hashes).clip(max=len(self._hashes) - 1)
        places = np.unique(places[self._hashes[places] == hashes])
        places = places[~self._found[places]]
        self._found[places] = True
        np.subtract.at(self._missing, self._hashes[places] >> self._shift, 1)


def _numbers(*texts: bytes) -> np.ndarray:
    """Bytes of texts, each text followed by 256: no window across two texts equals any text."""
    numbers = np.empty(sum(map(len, texts)) + len(texts), np.uint64)
    place = 0
    for text in texts:
        numbers[place:place + len(text)] = np.frombuffer(text, np.uint8)
        place += len(text)
        numbers[place] = 256
        place += 1
    return numbers


def _hashes_of(numbers: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield, chunk by chunk, a start and the hashes of all windows from there on."""
    for start in range(0, len(numbers) - WINDOW + 1, _CHUNK):
        yield start, _window_hashes(numbers[start:start + _CHUNK + WINDOW - 1])


def _window_hashes(numbers: np.ndarray) -> np.ndarray:
    """uint64 hash of every WINDOW numbers: h_2w[i] = h_w[i] * p^w + h_w[i + w], in five doublings."""
    hashes, power, width = numbers, 0x9E3779B97F4A7C15, 1
    while width < WINDOW:
        hashes = hashes[:-width] * np.uint64(power) + hashes[width:]
        power, width = power * power % (1 << 64), 2 * width
    hashes = hashes ^ (hashes >> np.uint64(31))
    return hashes * np.uint64(0xBF58476D1CE4E5B9)
