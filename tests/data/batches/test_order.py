"""The order of windows: whose turn it is, epochs that end where the tokens do, shares in whole numbers."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from moetrain.data.batches.order import Order, whole_shares, whose_turn

PROPERTIES = settings(max_examples=60, deadline=None, derandomize=True)


def order(sizes: list[int], shares: list[int], *, seq_len: int = 8, global_batch: int = 5,
          seed: int = 0) -> Order:
    return Order(key=(seed, "content"), sizes=sizes, shares=shares, seq_len=seq_len,
                 global_batch=global_batch)


@PROPERTIES
@given(shares=st.lists(st.integers(1, 12), min_size=1, max_size=9), rounds=st.integers(0, 10**9))
def test_every_round_gives_each_group_its_share_and_turns_count_up(shares: list[int], rounds: int) -> None:
    total = sum(shares)
    indices = np.arange(rounds * total, (rounds + 2) * total)
    groups, turns = whose_turn(indices, np.concatenate([[0], np.cumsum(shares)]))
    for group, share in enumerate(shares):
        assert turns[groups == group].tolist() == list(range(rounds * share, (rounds + 2) * share))
        assert np.count_nonzero(groups[:total] == group) == share
        so_far = np.cumsum(groups == group)                      # evenly: never far from what is due
        assert np.abs(so_far - np.arange(1, 2 * total + 1) * share / total).max() <= len(shares).bit_length()


def test_a_share_of_one_in_a_billion_is_neither_lost_nor_enlarged() -> None:
    total = 1 << 30
    around = np.concatenate([round * total + total // 2 - 1 + np.arange(-2, 3) for round in range(3)])
    groups, turns = whose_turn(around, np.array([0, 1, total]))
    assert groups.tolist() == [1, 1, 0, 1, 1] * 3 and turns[groups == 0].tolist() == [0, 1, 2]
    assert (turns[groups == 1].tolist()
            == [index - rare for index, rare in zip(around[groups == 1].tolist(),
                                                    (0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3))])


@PROPERTIES
@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=4), seq_len=st.integers(1, 20),
       steps=st.integers(1, 30))
def test_no_token_comes_again_before_all_others_of_its_group(sizes: list[int], seq_len: int,
                                                             steps: int) -> None:
    made = order(sizes, [1 + number for number in range(len(sizes))], seq_len=seq_len, global_batch=7)
    groups, places = made.windows(np.arange(7 * steps))
    assert ((places >= 0) & (places < np.array(sizes)[groups])).all()
    for group, size in enumerate(sizes):
        targets = (places[groups == group, None] + np.arange(seq_len)) % size
        counts = np.bincount(targets.ravel(), minlength=size)
        assert counts.max() - counts.min() <= 1


def test_epochs_differ_and_are_a_pure_function_of_the_index() -> None:
    made = order([800], [1])
    indices = np.arange(300)
    _, places = made.windows(indices)
    assert sorted(places[:100]) == sorted(places[100:200]) == list(range(0, 800, 8))
    assert (len({tuple(places[first:first + 100]) for first in (0, 100, 200)}) == 3
            and places[:100].tolist() != sorted(places[:100]))
    shuffled = np.random.default_rng(0).permutation(300)
    assert (np.concatenate([order([800], [1]).windows(shuffled[i:i + 1])[1] for i in range(300)]).tolist()
            == places[shuffled].tolist())
    assert order([800], [1], seed=1).windows(indices)[1].tolist() != places.tolist()


def test_a_slot_does_not_always_read_the_same_group() -> None:
    """Four domains and eight slots: taking turns alone, a rank would see two of the domains for ever."""
    groups, _ = order([800] * 4, [1] * 4, global_batch=8).windows(np.arange(8 * 200))
    steps = groups.reshape(200, 8)
    assert (np.sort(steps, 1) == np.repeat(np.arange(4), 2)).all()
    for slot in range(8):
        assert (np.bincount(steps[:, slot], minlength=4) > 25).all()


@pytest.mark.parametrize("shares, whole", [
    ([0.7, 0.2, 0.1], [7, 2, 1]), ([1.0, 1.0], [1, 1]), ([2.5, 5.0], [1, 2]), ([1 / 3, 2 / 3], [1, 2]),
    ([50, 30, 10], [5, 3, 1])])
def test_simple_ratios_are_kept_to_the_letter(shares: list[float], whole: list[int]) -> None:
    assert whole_shares([Fraction(share) for share in shares]) == whole


@pytest.mark.parametrize("shares", [(np.pi, np.e, 0.001), (1e-9, 1.0, 1e9), (1e-300, 1.0)])
def test_any_ratio_becomes_one_of_whole_numbers(shares: tuple[float, ...]) -> None:
    counts = np.array(whole_shares([Fraction(share) for share in shares]))
    assert counts.min() >= 1 and counts.sum() <= (1 << 30) + len(shares)
    assert np.abs(counts / counts.sum() - np.array(shares) / sum(shares)).max() < 2e-9
