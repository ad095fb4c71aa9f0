"""How much held-out text also occurs in the training text: what exact duplicates miss.

Windows of WINDOW bytes of held-out text, one every STRIDE bytes, are looked up among all windows of the training text, by
hash. Time grows with the text, memory with the number of windows that are looked up. Where held-out text has more of them
than that, every second or third ... one is taken, and the share is an estimate.
"""

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np

WINDOW, STRIDE = 32, 16
_CHUNK = 1 << 14                # bytes whose hashes are in memory at once: they fit the cache of a core
_GATHER = 1 << 16               # bytes of short training texts that are looked up together
_READ = 1 << 18                 # tokens read at once


class Share(NamedTuple):
    """windows: how many of held-out text were looked up; every: one in so many was."""

    value: float
    windows: int
    every: int


class Tokens(Protocol):
    """What is needed of a stream of tokens (data.prepared.TokenStream)."""

    size: int
    document_starts: np.ndarray

    def read(self, start: int, length: int) -> np.ndarray: ...


def token_overlap(heldout: Tokens, train: Tokens, *, as_bytes: bool, limit: int) -> Share | None:
    """The same of texts that are tokens of one tokenizer. None where there is nothing to look up.

    Args:
        heldout: what is looked up.
        train: where it is looked up.
        as_bytes: whether an id below 256 is a byte; otherwise a token is taken as four bytes, so a window is of eight tokens.
        limit: windows that are looked up at most.
    """
    measure = Overlap(heldout_bytes=heldout.size * (1 if as_bytes else 4), limit=limit)
    for start, end in pairwise([*heldout.document_starts.tolist(), heldout.size]):
        _exhaust(measure.heldout(_bytes_of(heldout, start, end, as_bytes)))
    _exhaust(measure.train(_bytes_of(train, 0, train.size, as_bytes)))
    return measure.share()


def _bytes_of(tokens: Tokens, start: int, end: int, as_bytes: bool) -> Iterator[bytes]:
    """Tokens start to end. The id that ends a document becomes a byte that no text has: 256 is 0."""
    for place in range(start, end, _READ):
        yield tokens.read(place, min(_READ, end - place)).astype("u1" if as_bytes else "<u4").tobytes()


def _exhaust(blocks: Iterator[bytes]) -> None:
    for _ in blocks:
        pass


class Overlap:
    """Feed all held-out texts, then all training texts; `share` is the answer.

    Args:
        heldout_bytes: size of all held-out texts.
        limit: windows of them that are looked up at most.
    """

    def __init__(self, *, heldout_bytes: int, limit: int) -> None:
        self._every = max(-(-heldout_bytes // (STRIDE * limit)), 1)
        self._pieces: list[np.ndarray] = []
        # of the noted windows, sorted; filled at the first look-up
        self._hashes = self._counts = np.zeros(0, np.uint64)
        self._found = np.zeros(0, bool)
        # A hash is searched for if two tables allow it: searching is slow.
        self._missing = np.zeros(0, np.uint8)  # by the upper bits of a hash: how many are not found yet
        self._seen = np.zeros(0, bool)                          # by its lower bits: is there one?
        self._shift = np.uint64(63)
        self._texts: list[bytes] = []                           # training texts that wait
        self._waiting = 0

    def heldout(self, blocks: Iterable[bytes]) -> Iterator[bytes]:
        """Hand the blocks of a held-out text on, and note its windows."""
        tail, place, stride = b"", 0, STRIDE * self._every  # place: of the first byte of `tail` in the text
        for block in blocks:
            text = tail + block
            for start, hashes in _hashes_of(_numbers(text)[:-1]):
                self._pieces.append(hashes[-(place + start) % stride::stride].copy())
            done = max(len(text) - WINDOW + 1, 0)
            tail, place = text[done:], place + done
            yield block

    def train(self, blocks: Iterable[bytes]) -> Iterator[bytes]:
        """Hand the blocks of a training text on, and look for the noted windows in it."""
        tail = b""
        for block in blocks:
            self._texts.append(tail + block)
            self._waiting += len(block)
            tail = self._texts[-1][-WINDOW + 1:]
            if self._waiting >= _GATHER:
                self._look_up()
            yield block

    def share(self) -> Share | None:
        """The share of the windows that were found. None where there were none."""
        self._look_up()
        windows = int(self._counts.sum())
        return (Share(int(self._counts[self._found].sum()) / windows, windows, self._every) if windows
                else None)

    def _look_up(self) -> None:
        if not len(self._missing):
            noted = np.concatenate([np.zeros(0, np.uint64), *self._pieces])
            self._hashes, self._counts = np.unique(noted, return_counts=True)
            self._pieces, self._found = [], np.zeros(len(self._hashes), bool)
            # sparse, and no larger than a cache where it can be
            bits = min((16 * len(self._hashes)).bit_length(), 24)
            self._shift = np.uint64(64 - bits)
            buckets, missing = np.unique(self._hashes >> self._shift, return_counts=True)
            self._missing = np.zeros(1 << bits, np.uint8)
            self._missing[buckets] = missing.clip(max=255)
            self._seen = np.zeros(1 << bits, bool)
            self._seen[self._hashes & np.uint64(len(self._seen) - 1)] = True
        if len(self._hashes):
            for _, hashes in _hashes_of(_numbers(*self._texts)):
                buckets = (hashes >> self._shift).view(np.int64)  # take has no way for unsigned numbers
                hashes = hashes[self._missing.take(buckets, mode="clip") != 0]  # clip: no check of the bounds
                self._mark(hashes[self._seen[hashes & np.uint64(len(self._seen) - 1)]])
        self._texts, self._waiting = [], 0

    def _mark(self, hashes: np.ndarray) -> None:
        """Mark the noted windows that have one of these hashes. A bucket whose windows are all found is not asked again."""
        places = np.searchsorted(self._hashes, hashes).clip(max=len(self._hashes) - 1)
        places = np.unique(places[self._hashes[places] == hashes])
        places = places[~self._found[places]]
        self._found[places] = True
        np.subtract.at(self._missing, self._hashes[places] >> self._shift, 1)


def _numbers(*texts: bytes) -> np.ndarray:
    """The bytes of the texts with a 256 behind each: no window that reaches from one into the next equals any text."""
    numbers = np.empty(sum(map(len, texts)) + len(texts), np.uint64)
    place = 0
    for text in texts:
        numbers[place:place + len(text)] = np.frombuffer(text, np.uint8)
        place += len(text)
        numbers[place] = 256
        place += 1
    return numbers


def _hashes_of(numbers: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(start, hash of every window from there on), a chunk at a time."""
    for start in range(0, len(numbers) - WINDOW + 1, _CHUNK):
        yield start, _window_hashes(numbers[start:start + _CHUNK + WINDOW - 1])


def _window_hashes(numbers: np.ndarray) -> np.ndarray:
    """uint64 hash of every WINDOW numbers: h_2w[i] = h_w[i] * p^w + h_w[i + w], five doublings."""
    hashes, power, width = numbers, 0x9E3779B97F4A7C15, 1
    while width < WINDOW:
        hashes = hashes[:-width] * np.uint64(power) + hashes[width:]
        power, width = power * power % (1 << 64), 2 * width
    hashes = hashes ^ (hashes >> np.uint64(31))
    return hashes * np.uint64(0xBF58476D1CE4E5B9)
