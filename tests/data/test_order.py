"""The order of samples: permutations read in stretches, blocks of domains, weights."""

import tracemalloc
from collections import Counter

import numpy as np
import pytest

from moetrain.data import order as order_module
from moetrain.data.order import BlockOrder, Permutations, indices_at, mixture_order, permutation

KEY = (0, "content")


def drawn(order, first: int, last: int, at_once: int = 256) -> np.ndarray:
    return np.concatenate([order.windows(np.arange(start, min(start + at_once, last)))
                           for start in range(first, last, at_once)])


@pytest.mark.parametrize("size, first, length", [(1, 0, 1), (5, 0, 5), (5, 4, 1), (5000, 0, 10), (5000, 2311, 700), (5000, 4990, 10)])
def test_a_stretch_is_a_part_of_the_whole_permutation(size: int, first: int, length: int) -> None:
    assert indices_at(KEY, size, first, length).tolist() == permutation(KEY, size)[first:first + length].tolist()


def test_chunks_and_a_margin_that_is_too_small_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = permutation(KEY, 3001)
    monkeypatch.setattr(order_module, "_CHUNK", 64)
    monkeypatch.setattr(order_module.math, "isqrt", lambda size: -7)     # a margin of 8: it has to be widened
    for first in range(0, 2990, 100):
        assert indices_at(KEY, 3001, first, 9).tolist() == whole[first:first + 9].tolist()


def test_stretches_are_kept_up_to_a_number_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order_module, "_SHORTEST", 100)
    monkeypatch.setattr(order_module, "_CACHE_BYTES", 10 * (400 + order_module._ENTRY_BYTES))
    permutations, made = Permutations(), []
    monkeypatch.setattr(order_module, "indices_at", lambda *place: made.append(place) or indices_at(*place))
    whole = permutation(KEY, 700)
    for _ in range(2):                                       # all seven stretches of 100 are kept
        assert permutations.at(KEY, 700, np.arange(700)).tolist() == whole.tolist()
    assert len(made) == 7
    for epoch in range(30):                                  # other epochs take their place
        permutations.at((*KEY, epoch), 700, np.arange(700))
    assert permutations._bytes <= 10 * (400 + order_module._ENTRY_BYTES)
    assert permutations._bytes == sum(kept.nbytes + order_module._ENTRY_BYTES for kept in permutations._stretches.values())


def test_a_batch_of_a_large_corpus_does_not_hold_its_permutations() -> None:
    """Four domains of 2 million windows, 256 sequences a step: sorted as a whole they are 64 MB and made anew every step."""
    order = mixture_order("uniform", key=(0, "f"), sizes=(2_000_000,) * 4, weights=[1] * 4)
    made = order_module.indices_at
    tracemalloc.start()
    try:
        order.windows(np.arange(256))
        assert tracemalloc.get_traced_memory()[1] < 24 << 20                 # to sort one of them alone takes 48 MB
        order_module.indices_at = lambda key, size, *place: made(key, size, *place) if size < 5 else pytest.fail("made again")
        order.windows(np.arange(256, 512))
    finally:
        tracemalloc.stop()
        order_module.indices_at = made
    assert order._permutations._bytes < 8 << 20
    assert order.windows(np.arange(1280, 1284)).tolist() == [7561520, 4557302, 2924605, 1640277]    # as sorting everything gave them


def test_weights_multiply_what_the_mixture_gives() -> None:
    """Proportional: so many times an epoch. Uniform: so many times a block. Half a time is every second epoch."""
    sizes = (50, 10, 20, 30)
    order = mixture_order("proportional", key=KEY, sizes=sizes, weights=[1, 3, 0.5, 0])
    epochs = [Counter(drawn(order, 90 * epoch, 90 * (epoch + 1)).tolist()) for epoch in range(4)]
    for epoch in epochs:
        assert [sum(count for window, count in epoch.items() if first <= window < last)
                for first, last in ((0, 50), (50, 60), (60, 80), (80, 110))] == [50, 30, 10, 0]
        assert {epoch[window] for window in range(50)} == {1} and {epoch[window] for window in range(50, 60)} == {3}
    assert {(epochs[0] + epochs[1])[window] for window in range(60, 80)} == {1}
    order = mixture_order("uniform", key=KEY, sizes=sizes, weights=[0.7, 0.2, 0.1, 0])
    assert order._counts.tolist() == [7, 2, 1, 0]
    windows = drawn(order, 0, 1000)
    domains = np.searchsorted([50, 60, 80], windows, "right").reshape(-1, 10)
    assert all(Counter(block.tolist()) == {0: 7, 1: 2, 2: 1} for block in domains)
    assert len({tuple(block) for block in domains}) > 50
    assert set(Counter(windows[windows < 50].tolist()).values()) == {14}             # 700 draws of 50 windows


@pytest.mark.parametrize("mixture", ["proportional", "uniform"])
def test_weights_that_are_alike_are_none(mixture: str) -> None:
    plain, twice = (mixture_order(mixture, key=KEY, sizes=(5, 9, 0), weights=[weight] * 3) for weight in (1.0, 2.0))
    assert drawn(plain, 0, 100).tolist() == drawn(twice, 0, 100).tolist()


@pytest.mark.parametrize("weights", [(np.pi, np.e, 0.001), (1e-9, 1.0, 1e9), (1 / 3, 2 / 3, 1.0)])
def test_any_ratio_makes_blocks_of_bounded_length(weights: tuple[float, ...]) -> None:
    counts = mixture_order("uniform", key=KEY, sizes=(9,) * 3, weights=weights)._counts
    assert counts.min() >= 1 and counts.sum() <= 10_002
    assert np.abs(counts / counts.sum() - np.array(weights) / sum(weights)).max() < 2e-4


@pytest.mark.parametrize("weights", [(2, 1, 0), (0.3, 0.3, 0.4)])
@pytest.mark.parametrize("mixture", ["proportional", "uniform"])
def test_a_weighted_order_is_a_pure_function_of_the_index(mixture: str, weights: tuple[float, ...]) -> None:
    orders = [mixture_order(mixture, key=KEY, sizes=(7, 30, 11), weights=weights) for _ in range(2)]
    assert isinstance(orders[0], BlockOrder)
    forward = drawn(orders[0], 0, 300)
    shuffled = np.random.default_rng(0).permutation(300)
    assert np.concatenate([orders[1].windows(shuffled[i:i + 1]) for i in range(300)]).tolist() == forward[shuffled].tolist()
