"""Order statistics by digits are those of sorting, to the bit, however the values are divided."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from moetrain.ops import order_statistics
from moetrain.ops.order_statistics import (
    DIGITS,
    FIRST,
    _binned,
    _scattered,
    digit_counts,
    next_base,
    num_finite,
    order_keys,
    values_of_keys,
)

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def selected(parts: list[Tensor], rank_E: Tensor) -> Tensor:
    """The values of a rank over all parts, each float32 [E, N]."""
    keys, base_E = [order_keys(part.clone()) for part in parts], torch.full((len(parts[0]),), FIRST).int()
    for digit in range(len(DIGITS)):
        counts_EB = sum(digit_counts(key, base_E, digit) for key in keys)
        base_E = next_base(counts_EB.cumsum(1, dtype=torch.int32), base_E, rank_E.int(), digit)
    return values_of_keys(base_E)


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
    keys = order_keys(values.clone()[None])
    assert (keys.diff() > 0).all() and bits(values_of_keys(keys))[0] == bits(values)


def test_devices_count_alike():
    columns_EN = torch.randint(9, (3, 50), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    counts = [count(columns_EN.clone(), 9) for count in (_binned, _scattered)]
    assert counts[0].equal(counts[1]) and counts[0].dtype == counts[1].dtype == torch.int32
    assert counts[0].sum(1).tolist() == [50, 50, 50]


@pytest.mark.parametrize("piece", [1, 7, 1 << 22])
def test_pieces_change_nothing(monkeypatch, piece):
    values = torch.randn(5, 30, generator=torch.Generator().manual_seed(0))
    whole = selected([values], torch.full((5,), 11))
    monkeypatch.setattr(order_statistics, "_PIECE", piece)
    assert selected([values], torch.full((5,), 11)).equal(whole)


def test_infinity_is_no_value():
    values = torch.tensor([[2.0, float("inf"), 3e38, -1.0], [float("inf")] * 4])
    up_to = digit_counts(order_keys(values.clone()), torch.full((2,), FIRST).int(), 0).cumsum(1)
    assert num_finite(up_to).tolist() == [3, 0] and up_to[:, -1].tolist() == [4, 4]
    assert selected([values], torch.tensor([2, 0])).tolist() == [torch.tensor(3e38).item(), float("inf")]
