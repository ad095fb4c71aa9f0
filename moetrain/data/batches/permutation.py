"""Keyed permutations of any size, asked for one place at a time: nothing is sorted, kept or drawn in advance.

`permuted` is a Feistel network over [0, a) x [0, b) with a b at least the size and less than a root of it above, which is
walked until the result is below the size (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). Its round
function is the finalizer of splitmix64 (Steele, Lea and Flood 2014): quick and even, no protection against anybody. Integers
alone are computed, so every machine and every release of NumPy finds the same.

`philox` is a bit generator for a key of any values; NumPy keeps its output stable (that of `Generator.permutation` it does not).
"""

import hashlib

import numpy as np

_ROUNDS = 16  # even, so that the halves end where they began; 8 leave 4 and 5 places uneven by a seventh
_STEP = np.uint64(0x9E3779B97F4A7C15)        # 2^64 over the golden ratio
_ODD = np.uint64(0xD1B54A32D192ED03)         # any odd number of even bits


def philox(*key: object) -> np.random.Philox:
    """A bit generator for a key of any values."""
    return np.random.Philox(key=np.frombuffer(_digest(key)[:16], "<u8"))


def permutation(key: tuple[object, ...], size: int) -> np.ndarray:
    """A whole permutation, by sorting: index of the number at each rank."""
    return np.argsort(philox(*key).random_raw(size), kind="stable")


def key_of(*key: object) -> np.uint64:
    """A key of `permuted` for any values."""
    return np.frombuffer(_digest(key)[:8], "<u8")[0]


def subkeys(key: np.uint64, *numbers: np.ndarray) -> np.ndarray:
    """A key of its own for every tuple of int64 numbers."""
    keys = np.full(np.broadcast_shapes((1,), *(np.shape(column) for column in numbers)), key)
    for column in numbers:
        keys = _mixed(keys ^ _mixed(np.atleast_1d(column).astype(np.uint64) + _STEP))
    return keys


def permuted(places: np.ndarray, sizes: np.ndarray | int, keys: np.ndarray | np.uint64) -> np.ndarray:
    """int64: what stands at each place of the permutation of 0 … size - 1 that its key names.

    Args:
        places: int64, each from 0 on and below its size.
        sizes: int64 up to 2^60, one for all or one each.
        keys: uint64, one for all or one each.
    """
    found, sizes, keys = np.array(places, np.uint64), *np.broadcast_arrays(np.asarray(sizes, np.uint64), keys)
    sizes, keys = np.broadcast_to(sizes, found.shape), np.broadcast_to(keys, found.shape)
    walking = np.arange(found.size)
    while walking.size:
        found[walking] = _network(found[walking], sizes[walking], keys[walking])
        walking = walking[found[walking] >= sizes[walking]]
    return found.astype(np.int64)


def _network(places: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """One pass of the network, over a b places."""
    a = np.sqrt(sizes).astype(np.uint64) + np.uint64(1)
    b = (sizes + a - np.uint64(1)) // a
    left, right = np.divmod(places, b)
    for number in range(_ROUNDS):
        modulus = b if number % 2 else a
        keys = keys + _STEP                              # another function every round; wraps around
        left, right = right, (left + (_mixed(keys ^ (right * _ODD)) >> np.uint64(1))) % modulus
    return left * b + right


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64: every bit of a number changes half of the result."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def _digest(key: tuple[object, ...]) -> bytes:
    return hashlib.sha256(repr(key).encode()).digest()
