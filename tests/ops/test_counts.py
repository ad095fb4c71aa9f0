"""Occurrences of each id: used slots alone, and zero for an id that does not occur."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings, strategies as st

from moetrain.ops.counts import count_ids


@pytest.mark.parametrize("ids, expected", [
    ([[0, 2], [2, -1], [-1, -1]], [1, 0, 2, 0]),
    ([[3], [3], [3]], [0, 0, 0, 3]),
    ([[-1, -1]], [0, 0, 0, 0]),
])
def test_counts_used_slots_of_every_expert(ids, expected):
    counts_E = count_ids(torch.tensor(ids), 4)
    assert counts_E.tolist() == expected and counts_E.dtype == torch.int64


@given(st.integers(1, 9).flatmap(lambda ids: st.tuples(st.just(ids), st.lists(st.integers(-1, ids - 1)))))
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_any_ids_are_counted_as_a_counter_counts_them(drawn):
    num_ids, ids = drawn
    expected = Counter(ids)
    counts = count_ids(torch.tensor(ids, dtype=torch.int64), num_ids)
    assert counts.tolist() == [expected[id] for id in range(num_ids)]


def test_no_tokens_count_zero_for_every_expert():
    assert count_ids(torch.zeros(0, 2, dtype=torch.int64), 3).tolist() == [0, 0, 0]
