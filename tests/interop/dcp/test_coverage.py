"""Chunks of a tensor against a count of every element."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from moetrain.interop.dcp.coverage import Unchecked, faults
from moetrain.interop.dcp.records import StoredChunk


def chunk(*spans: tuple[int, int]) -> StoredChunk:
    offsets, sizes = tuple(begin for begin, _ in spans), tuple(end - begin for begin, end in spans)
    return StoredChunk(offsets, sizes, "", 0, 0)


@st.composite
def boxes(draw):
    shape = draw(st.lists(st.integers(1, 5), min_size=0, max_size=3))
    sides = [st.tuples(st.integers(0, size - 1), st.integers(0, size - 1)).map(
        lambda pair: (min(pair), max(pair) + 1)) for size in shape]
    return tuple(shape), draw(st.lists(st.tuples(*sides), max_size=5))


@given(boxes())
@settings(max_examples=150, deadline=None)
def test_as_a_count_of_every_element_says(case):
    shape, spans = case
    count = np.zeros(shape, int)
    for box in spans:
        count[tuple(slice(*span) for span in box)] += 1
    told = np.ones(shape, int)
    for text in faults(shape, [chunk(*box) for box in spans]):
        region, _, word = text[1:].partition("] is ")
        place = tuple(slice(*map(int, span.split(":"))) for span in region.split(", ") if span)
        assert (told[place] == 1).all(), "an element is named twice"
        told[place] = 0 if word == "missing" else 2
    np.testing.assert_array_equal(told, np.minimum(count, 2))


def test_a_missing_chunk_is_named():
    rows = [chunk((first, first + 2), (0, 6)) for first in (0, 2, 6)]
    assert list(faults((8, 6), rows)) == ["[4:6, 0:6] is missing"]


def test_a_large_grid_is_quick_and_a_tangle_ends():
    grid = [chunk((row, row + 1), (column, column + 1)) for row in range(100) for column in range(100)]
    assert not list(faults((100, 100), grid))
    tangle = [chunk((index, 4000 - index), (0, 1)) for index in range(2000)]
    with pytest.raises(Unchecked):
        list(faults((4000, 1), tangle))
