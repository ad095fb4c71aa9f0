"""Groups of a mixture: what is read together, and how often it comes."""

import pytest

from moetrain.data.batches.mixture import mixture_groups


@pytest.mark.parametrize("mixture, tokens, weights, expected", [
    ("proportional", [50, 0, 9], [1, 1, 1], [([0, 2], 1)]),
    ("proportional", [50, 10, 9], [2, 2, 2], [([0, 1, 2], 1)]),
    ("proportional", [50, 10, 20, 30], [1, 3, 0.5, 0], [([0], 5), ([1], 3), ([2], 1)]),
    ("proportional", [50, 10, 20, 30], [1, 3, 1, 3], [([0, 2], 7), ([1, 3], 12)]),
    ("uniform", [50, 10, 20, 30], [1, 1, 1, 1], [([0], 1), ([1], 1), ([2], 1), ([3], 1)]),
    ("uniform", [50, 10, 20, 30], [0.7, 0.2, 0.1, 0], [([0], 7), ([1], 2), ([2], 1)]),
    ("uniform", [50, 9], [1, 1], [([0], 1), ([1], 1)]),
    ("uniform", [50, 9, 20, 4, 2], [1, 1, 1, 3, 1], [([0], 1), ([2], 1), ([1, 3, 4], 5)]),
    ("uniform", [5, 4], [1, 2], [([0, 1], 1)]),
    ("proportional", [50, 4, 1], [1, 2, 3], [([0], 50), ([1, 2], 11)]),
    ("uniform", [50, 0], [1, 1], [([0], 1)]),
    ("uniform", [0, 5], [1, 0], []),
])
def test_groups_and_their_shares(mixture: str, tokens: list[int], weights: list[float],
                                 expected: list) -> None:
    assert ([tuple(group) for group in mixture_groups(mixture, tokens=tokens, weights=weights, seq_len=10)]
            == expected)
