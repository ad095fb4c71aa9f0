"""Windows over ranges: pieces in order, one number for each, nothing lost and nothing twice."""

import numpy as np
from hypothesis import given, settings, strategies as st

from moetrain.data.batches.windows import Piece, Windows

GROUPS = [[(10, 14), (14, 16), (20, 21)], [(0, 3), (16, 16), (5, 10)]]


def places(pieces: list[Piece]) -> list[int]:
    return [place for start, length in pieces for place in range(start, start + length)]


def test_ranges_that_touch_are_one_piece_and_empty_ones_are_none() -> None:
    found = Windows(GROUPS, seq_len=5, wraps=False)
    assert found.tokens.tolist() == [7, 8] and found.sizes.tolist() == [10, 10] and found.count == 4
    assert [found.pieces(number) for number in range(4)] == [
        [(10, 5)], [(15, 1), (20, 1)], [(0, 3), (5, 2)], [(7, 3)]]


def test_a_group_that_wraps_goes_on_with_its_beginning() -> None:
    found = Windows(GROUPS, seq_len=5, wraps=True)
    assert found.count == 7 + 8
    assert found.pieces(5) == [(15, 1), (20, 1), (10, 3)] and found.pieces(14) == [(9, 1), (0, 3), (5, 1)]
    assert places(Windows([[(3, 5)]], seq_len=7, wraps=True).pieces(1)) == [4, 3, 4, 3, 4, 3, 4]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(groups=st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=5), min_size=1, max_size=4).filter(
    lambda groups: all(map(sum, groups))), seq_len=st.integers(1, 15), wraps=st.booleans())
def test_numbers_name_windows_one_to_one(groups: list[list[int]], seq_len: int, wraps: bool) -> None:
    ends = np.cumsum([size for group in groups for size in group]).tolist()
    every = iter(zip([0, *ends], ends))
    windows = Windows([[next(every) for _ in group] for group in groups], seq_len=seq_len, wraps=wraps)
    found = [tuple(places(windows.pieces(number))) for number in range(windows.count)]
    for group, size in enumerate(windows.sizes.tolist()):
        at = np.arange(0, size, np.gcd(size, seq_len))
        numbers = windows.numbers(np.full(len(at), group), at)
        assert ([tuple(places(windows.pieces_at(group, place))) for place in at.tolist()]
                == [found[number] for number in numbers.tolist()])
    if wraps:
        assert {len(window) for window in found} == {seq_len}
    else:
        assert sorted(sum(found, ())) == list(range(ends[-1]))
        assert sum(len(window) < seq_len for window in found) <= len(groups)
