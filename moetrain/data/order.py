"""The order of training samples: keyed permutations, so that sample (step, slot) can be asked for directly.

Index g = (step - 1) * global_batch + slot counts samples from the start of the run. Every epoch is a permutation
keyed by (seed, fingerprint, epoch): there is no state to save, and how many ranks read is of no concern.

    ProportionalOrder    every window once an epoch
    BlockOrder           every block of indices holds each domain a fixed number of times; a domain has epochs of its own

A permutation sorts 64-bit numbers of the Philox bit generator, whose output NumPy keeps stable between versions (that of
`Generator.permutation` it does not). It is never held as a whole: `Permutations` says how.
"""

import hashlib
import math
from collections import OrderedDict
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

_CACHE_BYTES = 64 << 20         # of all stretches that an order keeps
_ENTRY_BYTES = 1 << 10          # what Python keeps for an entry of the cache beside its numbers
_SHORTEST, _LONGEST = 1 << 16, 1 << 20      # ranks of a stretch
_CHUNK = 1 << 18                # random numbers in memory at once
_LARGEST_BLOCK = 10_000         # weights whose ratio needs a longer block are rounded to this many parts


def philox(*key: object) -> np.random.Philox:
    """A bit generator for a key of any values."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return np.random.Philox(key=np.frombuffer(digest[:16], "<u8"))


def permutation(key: tuple[object, ...], size: int) -> np.ndarray:
    """The whole permutation of a key: index of the number at each rank."""
    return np.argsort(philox(*key).random_raw(size), kind="stable")


class Permutations:
    """Keyed permutations, read by rank in bounded memory.

    The indices at a stretch of consecutive ranks are those of the numbers in a known range of values, give or take what
    chance moves: one pass over the numbers of the key finds them, a chunk at a time. Training asks for ranks in ascending
    order, so a pass serves a whole stretch. Sorting everything instead takes 24 bytes a window and a wait at every epoch.

    Args:
        streams: how many permutations are read side by side (the domains of a mixture). Each finds room for two stretches.
    """

    def __init__(self, *, streams: int = 1) -> None:
        self._longest = min(_LONGEST, max(_CACHE_BYTES // (2 * streams * 8), 1 << 10))
        self._stretches: OrderedDict[tuple[object, ...], np.ndarray] = OrderedDict()
        self._bytes = 0

    def at(self, key: tuple[object, ...], size: int, ranks: np.ndarray) -> np.ndarray:
        """int64 indices at these ranks of the permutation `permutation(key, size)`."""
        length = min(max(_SHORTEST, size // 8), self._longest)
        numbers, found = ranks // length, np.empty(len(ranks), np.int64)
        for number in sorted(set(numbers.tolist())):
            chosen = numbers == number
            found[chosen] = self._stretch(key, size, number, length)[ranks[chosen] - number * length]
        return found

    def _stretch(self, key: tuple[object, ...], size: int, number: int, length: int) -> np.ndarray:
        name = (key, size, number)
        if name not in self._stretches:
            first = number * length
            stretch = indices_at(key, size, first, min(length, size - first)).astype(np.uint32 if size < 1 << 32 else np.int64)
            self._stretches[name] = stretch
            self._bytes += stretch.nbytes + _ENTRY_BYTES
            while self._bytes > _CACHE_BYTES and len(self._stretches) > 1:
                self._bytes -= self._stretches.popitem(last=False)[1].nbytes + _ENTRY_BYTES
        self._stretches.move_to_end(name)
        return self._stretches[name]


def indices_at(key: tuple[object, ...], size: int, first: int, length: int) -> np.ndarray:
    """`permutation(key, size)[first:first + length]` without the rest of it."""
    if length == size:
        return permutation(key, size)
    margin = 8 * math.isqrt(size) + 64             # 16 standard deviations of how many numbers lie below a value
    while True:
        low = (max(first - margin, 0) << 64) // size
        high = (min(first + length + margin, size) << 64) // size - 1
        below, indices = _between(key, size, low, high)
        if below <= first and first + length <= below + len(indices):
            return indices[first - below:first - below + length]
        margin *= 4


def _between(key: tuple[object, ...], size: int, low: int, high: int) -> tuple[int, np.ndarray]:
    """(how many numbers of the key are below `low`, indices of those from low to high in their order)."""
    generator, below, numbers, indices = philox(*key), 0, [], []
    for start in range(0, size, _CHUNK):
        drawn = generator.random_raw(min(_CHUNK, size - start))
        below += int(np.count_nonzero(drawn < np.uint64(low)))
        inside = np.flatnonzero(drawn - np.uint64(low) <= np.uint64(high - low))     # unsigned: what is below wraps around
        numbers.append(drawn[inside])
        indices.append(start + inside)
    return below, np.concatenate(indices)[np.argsort(np.concatenate(numbers), kind="stable")]


class ProportionalOrder:
    """Every window once an epoch: domains come by their size."""

    def __init__(self, *, key: tuple[object, ...], sizes: Sequence[int]) -> None:
        self._key, self._size, self._permutations = key, sum(sizes), Permutations()

    def windows(self, indices: np.ndarray) -> np.ndarray:
        return _epochwise(self._permutations, self._key, indices, self._size)


class BlockOrder:
    """Every block of sum(counts) indices holds domain d counts[d] times, in keyed order; a domain has epochs of its own.

    Args:
        key: what the order depends on.
        sizes: windows of each domain.
        counts: windows of each domain in a block; 0 leaves a domain out.
    """

    def __init__(self, *, key: tuple[object, ...], sizes: Sequence[int], counts: Sequence[int]) -> None:
        assert len(sizes) == len(counts) and any(counts), (sizes, counts)
        assert all(size > 0 for size, count in zip(sizes, counts) if count), (sizes, counts)
        self._key, self._sizes, self._counts = key, sizes, np.asarray(counts, np.int64)
        self._first = np.concatenate([[0], np.cumsum(sizes)])
        self._slots = np.concatenate([[0], np.cumsum(self._counts)])
        self._permutations = Permutations(streams=1 + sum(count > 0 for count in counts))

    def windows(self, indices: np.ndarray) -> np.ndarray:
        blocks, places = np.divmod(indices, int(self._slots[-1]))
        slots = np.empty(len(indices), np.int64)
        for block in set(blocks.tolist()):
            chosen = blocks == block
            slots[chosen] = self._permutations.at((*self._key, "block", block), int(self._slots[-1]), places[chosen])
        domains = np.searchsorted(self._slots, slots, "right") - 1
        turns = blocks * self._counts[domains] + slots - self._slots[domains]
        windows = np.empty(len(indices), np.int64)
        for domain in set(domains.tolist()):
            chosen = domains == domain
            inside = _epochwise(self._permutations, (*self._key, domain), turns[chosen], int(self._sizes[domain]))
            windows[chosen] = self._first[domain] + inside
        return windows


def mixture_order(mixture: str, *, key: tuple[object, ...], sizes: Sequence[int],
                  weights: Sequence[float]) -> ProportionalOrder | BlockOrder:
    """The order of a mixture.

    Args:
        mixture: `proportional` (domains by their size) or `uniform` (each alike).
        key: what the order depends on.
        sizes: windows of each domain; one without any is left out.
        weights: how many times as often as the mixture alone has it a domain comes; 0 leaves it out.
    """
    used = [weight if size else 0 for size, weight in zip(sizes, weights)]
    if mixture == "proportional" and len(set(weights)) == 1:
        return ProportionalOrder(key=key, sizes=sizes)
    shares = [Fraction(weight) * (size if mixture == "proportional" else 1) for size, weight in zip(sizes, used)]
    if mixture == "proportional":
        counts = [max(round(share), 1) if share else 0 for share in shares]
    else:
        counts = _whole(shares)
    return BlockOrder(key=key, sizes=sizes, counts=counts)


def _whole(shares: Sequence[Fraction]) -> list[int]:
    """The smallest whole numbers in this ratio; rounded, but never to 0, where they would make a long block."""
    simple = [share.limit_denominator(_LARGEST_BLOCK) for share in shares]         # 1/10 for 0.1
    scale = math.lcm(*(share.denominator for share in simple))
    counts = [int(share * scale) for share in simple]
    counts = [count // math.gcd(*counts) for count in counts]
    if sum(counts) <= _LARGEST_BLOCK and all(count > 0 for count, share in zip(counts, shares) if share):
        return counts
    total = sum(shares)
    return [max(round(share * _LARGEST_BLOCK / total), 1) if share else 0 for share in shares]


def _epochwise(permutations: Permutations, key: tuple[object, ...], indices: np.ndarray, size: int) -> np.ndarray:
    epochs, places = np.divmod(indices, size)
    result = np.empty(len(indices), np.int64)
    for epoch in set(epochs.tolist()):
        chosen = epochs == epoch
        result[chosen] = permutations.at((*key, "epoch", epoch), size, places[chosen])
    return result
