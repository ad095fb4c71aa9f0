"""Order statistics by digits are those of sorting, to the bit, however the values are divided."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from moetrain.ops.order_statistics import (
    DIGITS,
    _binned,
    _scattered,
    digit_counts,
    next_digit,
    num_finite,
    order_keys,
    values_of_keys,
)

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def selected(parts: list[Tensor], rank_E: Tensor) -> Tensor:
    """The values of a rank over all parts, each float32 [E, N]."""
    keys, found_E = [order_keys(part) for part in parts], None
    for digit in range(len(DIGITS)):
        counts_EB = sum(digit_counts(key, found_E, digit) for key in keys)
        found_E, rank_E = next_digit(counts_EB, found_E, rank_E)
    return values_of_keys(found_E)


def bits(values: Tensor) -> list[int]:
    return values.view(torch.int32).tolist()


def test_three_digits_are_the_32_bits_of_a_key():
    assert sum(DIGITS) == 32 and len(DIGITS) == 3


@given(st.lists(FLOATS, min_size=1, max_size=40), st.data())
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_the_value_of_a_rank_is_that_of_a_sorted_array(values, data):
    rank, cut = (data.draw(st.integers(0, len(values) - 1)) for _ in range(2))
    row = torch.tensor([values, values[::-1]])
    found = selected([row[:, :cut], row[:, cut:]], torch.tensor([rank, rank]))
    expected = np.sort(row.numpy() + np.float32(0), axis=1)[:, rank]         # of -0 and 0, numpy keeps either
    assert ((found + 0).numpy() == expected).all() and bits(found)[0] == bits(found)[1]


def test_keys_are_ordered_as_their_values_and_give_them_back():
    values = torch.tensor([-float("inf"), -3e38, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, 3e38, float("inf")])
    keys = order_keys(values)
    assert (keys.diff() > 0).all() and bits(values_of_keys(keys)) == bits(values)


@pytest.mark.parametrize("masked", [False, True])
def test_devices_count_alike(masked):
    generator = torch.Generator().manual_seed(0)
    values_EN = torch.randint(9, (3, 50), dtype=torch.int32, generator=generator)
    counted_EN = values_EN.roll(1, 1) > 3 if masked else None
    counts = [count(values_EN, counted_EN, 9) for count in (_binned, _scattered)]
    assert counts[0].equal(counts[1]) and counts[0].dtype == counts[1].dtype == torch.int32
    assert counts[0].sum() == (counted_EN.sum() if masked else 150)


def test_infinity_is_no_value():
    values = torch.tensor([[2.0, float("inf"), 3e38, -1.0], [float("inf")] * 4])
    counts = digit_counts(order_keys(values), None, 0)
    assert num_finite(counts).tolist() == [3, 0] and counts.sum(1).tolist() == [4, 4]
    assert selected([values], torch.tensor([2, 0])).tolist() == [torch.tensor(3e38).item(), float("inf")]
