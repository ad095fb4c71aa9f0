"""Keyed permutations: one to one for every size, even over keys, the same on every machine."""

import math
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from scipy.stats import chi2

from moetrain.data.batches.permutation import key_of, permutation, permuted, subkeys

KEY = key_of("test")


def evenness(counts: np.ndarray, cells: int) -> float:
    """The chance that even counts are as uneven as these."""
    expected = counts.sum() / cells
    observed = np.append(counts, np.zeros(cells - len(counts)))
    return float(chi2.sf(((observed - expected) ** 2 / expected).sum(), cells - 1))


def test_every_size_is_permuted() -> None:
    every = np.concatenate([np.arange(1, 300), np.arange(300, 2001, 17)])
    sizes, places = np.repeat(every, every), np.concatenate([np.arange(size) for size in every.tolist()])
    found = permuted(places, sizes, subkeys(KEY, sizes))
    assert (found[np.lexsort((found, sizes))] == places).all()


@pytest.mark.parametrize("size", [1 << 17, (1 << 17) + 1, 199_999])
def test_a_large_size_is_permuted(size: int) -> None:
    found = permuted(np.arange(size), size, KEY)
    assert (np.bincount(found, minlength=size) == 1).all()
    others = permuted(np.arange(size), size, subkeys(KEY, np.array(1)))
    straight = np.arange(size)
    for one, two in ((found, straight), (found, others), (found[1:], found[:-1]), (found[2:], found[:-2])):
        assert abs(np.corrcoef(one, two)[0, 1]) < 5 / math.sqrt(size)


def test_places_beyond_what_memory_could_hold_are_found_alone() -> None:
    places = np.array([0, 1, 10**15, (1 << 60) - 1])
    found = permuted(places, 1 << 60, KEY)
    assert len(set(found.tolist())) == 4 and (found >= 0).all() and (found < 1 << 60).all()
    assert (np.concatenate([permuted(places[i:i + 1], 1 << 60, KEY) for i in range(4)]) == found).all()


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_all_permutations_of_a_few_are_as_likely(size: int) -> None:
    keys = subkeys(KEY, np.arange(300 * 120))
    rows = np.stack([permuted(np.full(len(keys), place), size, keys) for place in range(size)], 1)
    counts = Counter(map(tuple, rows.tolist()))
    assert counts.keys() == set(permutations(range(size)))
    assert 1e-5 < evenness(np.array(list(counts.values())), math.factorial(size))


@pytest.mark.parametrize("size", [10, 100, 1000])
def test_what_stands_at_two_places_is_even_and_independent_over_keys(size: int) -> None:
    keys = subkeys(KEY, np.arange(50_000), np.array(7))
    first, second, last = (permuted(np.full(len(keys), place), size, keys) for place in (0, 1, size - 1))
    for found in (first, second, last):
        assert 1e-5 < evenness(np.bincount(found), size)
    for one, two in ((first, second), (first, last)):
        assert 1e-5 < evenness(np.bincount((one - two) % size)[1:], size - 1)
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 5 / math.sqrt(len(keys))


def test_a_key_is_one_of_its_numbers_in_their_order() -> None:
    keys = [subkeys(KEY, np.array(numbers[0]), *map(np.array, numbers[1:]))
            for numbers in ((1, 2), (2, 1), (1,), (2,), (1, 2, 0))]
    assert len({int(key[0]) for key in keys}) == 5 and key_of("a", 1) != key_of("a", 2)


def test_the_order_of_a_release_is_that_of_the_next() -> None:
    """A resumed run must find its data where an older moetrain left it: a change here breaks every resume."""
    assert permuted(np.arange(8), 1000, KEY).tolist() == [658, 267, 724, 84, 118, 507, 814, 731]
    assert permutation((0, "content"), 8).tolist() == [5, 7, 3, 2, 1, 0, 4, 6]
