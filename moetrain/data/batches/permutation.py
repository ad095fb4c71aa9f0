"""Keyed permutations of any size, evaluated place by place: nothing is sorted, stored or drawn in advance.

`permuted` is a Feistel network over [0, a) x [0, b), with a b at least the size and less than a root of it
above, which is repeated until the result is below the size (Black and Rogaway 2002, "Ciphers with arbitrary
finite domains"). Its round function is the finalizer of splitmix64 (Steele, Lea and Flood 2014): fast and
even, but not secure. It computes with integers alone, so every machine and every release of NumPy gives the
same result.

`philox` is a bit generator for a key of any values; NumPy keeps its output stable, unlike that of
`Generator.permutation`.
"""

import hashlib

import numpy as np

# Even, so that the halves end where they began. 8 rounds leave permutations of 4 and 5 uneven by a seventh.
_ROUNDS = 16
_STEP = np.uint64(0x9E3779B97F4A7C15)        # 2^64 over the golden ratio
_ODD = np.uint64(0xD1B54A32D192ED03)         # any odd number of even bits


def philox(*key: object) -> np.random.Philox:
    """A bit generator for a key of any values."""
    return np.random.Philox(key=np.frombuffer(_digest(key)[:16], "<u8"))


def permutation(key: tuple[object, ...], size: int) -> np.ndarray:
    """A whole permutation of 0 … size - 1 by sorting random numbers, int64 [size]."""
    return np.argsort(philox(*key).random_raw(size), kind="stable")


def key_of(*key: object) -> np.uint64:
    """A uint64 key of `permuted` from any values."""
    return np.frombuffer(_digest(key)[:8], "<u8")[0]


def subkeys(key: np.uint64, *numbers: np.ndarray) -> np.ndarray:
    """uint64 keys, one for every tuple of int64 numbers, derived from a key."""
    keys = np.full(np.broadcast_shapes((1,), *(np.shape(column) for column in numbers)), key)
    for column in numbers:
        keys = _mixed(keys ^ _mixed(np.atleast_1d(column).astype(np.uint64) + _STEP))
    return keys


def permuted(places: np.ndarray, sizes: np.ndarray | int, keys: np.ndarray | np.uint64) -> np.ndarray:
    """Evaluate permutations of 0 … size - 1 at some places.

    Args:
        places: int64, each at least 0 and below its size.
        sizes: int64 up to 2^60, one for all places or one each.
        keys: uint64, the permutation: one for all places or one each.

    Returns:
        int64, the number at each place.
    """
    found, sizes, keys = np.array(places, np.uint64), *np.broadcast_arrays(np.asarray(sizes, np.uint64), keys)
    sizes, keys = np.broadcast_to(sizes, found.shape), np.broadcast_to(keys, found.shape)
    walking = np.arange(found.size)
    while walking.size:
        found[walking] = _network(found[walking], sizes[walking], keys[walking])
        walking = walking[found[walking] >= sizes[walking]]
    return found.astype(np.int64)


def _network(places: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """One pass of the Feistel network over a b places."""
    a = np.sqrt(sizes).astype(np.uint64) + np.uint64(1)
    b = (sizes + a - np.uint64(1)) // a
    left, right = np.divmod(places, b)
    for number in range(_ROUNDS):
        modulus = b if number % 2 else a
        keys = keys + _STEP                              # another function each round; wraps around
        left, right = right, (left + (_mixed(keys ^ (right * _ODD)) >> np.uint64(1))) % modulus
    return left * b + right


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64: every bit of a number changes half of the result's bits."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def _digest(key: tuple[object, ...]) -> bytes:
    return hashlib.sha256(repr(key).encode()).digest()
