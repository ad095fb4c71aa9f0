"""The order of training samples: keyed permutations, so that sample (step, slot) can be asked for directly.

Index g = (step - 1) * global_batch + slot counts samples from the start of the run. Every epoch is a permutation
keyed by (seed, fingerprint, epoch): there is no state to save, and how many ranks read is of no concern.

Permutations sort 64-bit numbers of the Philox bit generator, whose output NumPy keeps stable between versions (that of
`Generator.permutation` it does not).
"""

import hashlib
from functools import lru_cache

import numpy as np


def philox(*key: object) -> np.random.Philox:
    """A bit generator for a key of any values."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return np.random.Philox(key=np.frombuffer(digest[:16], "<u8"))


class ProportionalOrder:
    """Every window once an epoch: domains come by their size."""

    def __init__(self, *, key: tuple[object, ...], sizes: tuple[int, ...]) -> None:
        self._key, self._size = key, sum(sizes)

    def windows(self, indices: np.ndarray) -> np.ndarray:
        return _epochwise(self._key, indices, self._size)


class UniformOrder:
    """Every block of n indices holds each of the n domains once, in keyed order; a domain has epochs of its own."""

    def __init__(self, *, key: tuple[object, ...], sizes: tuple[int, ...]) -> None:
        assert min(sizes) > 0, sizes
        self._key, self._sizes = key, sizes
        self._first = np.concatenate([[0], np.cumsum(sizes)])

    def windows(self, indices: np.ndarray) -> np.ndarray:
        blocks, places = np.divmod(indices, len(self._sizes))
        orders = {int(block): permutation((*self._key, "block", int(block)), len(self._sizes)) for block in set(blocks)}
        domains = np.array([orders[block][place] for block, place in zip(blocks, places)], np.int64)
        windows = np.empty(len(indices), np.int64)
        for domain in set(domains.tolist()):
            chosen = domains == domain
            inside = _epochwise((*self._key, domain), blocks[chosen], self._sizes[domain])
            windows[chosen] = self._first[domain] + inside
        return windows


def _epochwise(key: tuple[object, ...], indices: np.ndarray, size: int) -> np.ndarray:
    epochs, places = np.divmod(indices, size)
    result = np.empty(len(indices), np.int64)
    for epoch in set(epochs.tolist()):
        chosen = epochs == epoch
        result[chosen] = permutation((*key, "epoch", epoch), size)[places[chosen]]
    return result


@lru_cache(maxsize=64)
def permutation(key: tuple[object, ...], size: int) -> np.ndarray:
    order = np.argsort(philox(*key).random_raw(size), kind="stable")
    order.setflags(write=False)
    return order
