"""Overlap of held-out and training text: exact if small, sampled if large, linear in both."""

import tracemalloc

import numpy as np
import pytest

from moetrain.data.corpus.overlap import STRIDE, WINDOW, Overlap, Share


def noise(seed: int, size: int) -> bytes:
    return np.random.default_rng(seed).integers(97, 123, size, np.uint8).tobytes()


def pieces(text: bytes, size: int) -> list[bytes]:
    return [text[start:start + size] for start in range(0, len(text), size)]


def measured(heldout: list[bytes], train: list[bytes], limit: int = 10**6, block: int = 1000) -> Share | None:
    overlap = Overlap(heldout_bytes=sum(map(len, heldout)), limit=limit)
    for note, texts in ((overlap.heldout, heldout), (overlap.train, train)):
        for text in texts:
            assert b"".join(note(pieces(text, block))) == text
    return overlap.share()


def counted(heldout: list[bytes], train: list[bytes]) -> Share:
    """The same by its definition."""
    known = {text[start:start + WINDOW] for text in train for start in range(len(text) - WINDOW + 1)}
    windows = [text[start:start + WINDOW] for text in heldout
               for start in range(0, len(text) - WINDOW + 1, STRIDE)]
    return Share(sum(window in known for window in windows) / len(windows), len(windows), 1)


@pytest.mark.parametrize("block", [7, 31, 32, 33, 1000, 20_000, 1 << 20])
def test_it_is_the_share_of_windows_that_occur(block: int) -> None:
    """In blocks of any size: texts moved by odd distances, shorter than a window, the same text twice."""
    shared = noise(0, 3000)
    heldout = [shared + noise(1, 1000), noise(2, 1500) + shared[:700], shared[5:1200], shared[5:1200],
               b"short", noise(3, 32)]
    train = [noise(4, 77) + shared[:1000], b"x", shared[990:2001] + noise(5, 40_000), noise(3, 32)[:20],
             noise(3, 32)[20:]]
    assert measured(heldout, train, block=block) == counted(heldout, train)


def test_a_window_does_not_reach_from_one_text_into_the_next() -> None:
    text = noise(0, 3200)
    assert measured([text], pieces(text, 31)).value == 0 and measured([text], [text]).value == 1
    assert measured([b"short"], [text]) is None and measured([text], []).value == 0


def test_a_sample_is_close_and_bounded() -> None:
    parts = [noise(seed, 400) for seed in range(500)]
    exact = measured(parts, parts[::3])
    sampled = measured(parts, parts[::3], limit=2000)
    assert (exact.every, sampled.every) == (1, 7) and sampled.windows <= 2500
    assert abs(sampled.value - exact.value) < 0.03 and 0.3 < exact.value < 0.36


def test_repeated_text_is_looked_up_once() -> None:
    """Where every window is found again and again: none is searched for after the first time."""
    base = [noise(seed, 1600) for seed in range(60)]
    overlap, searched = Overlap(heldout_bytes=60 * 1600, limit=10**6), []
    mark = overlap._mark
    overlap._mark = lambda hashes: searched.append(len(hashes)) or mark(hashes)
    for text in base:
        list(overlap.heldout([text]))
    for _ in range(20):
        for text in base:
            list(overlap.train([text + b"!"]))
    assert overlap.share().value == 1
    assert sum(searched) < 3 * 60 * 100                      # 100 windows a text; all of it has 1.9 million


def test_memory_does_not_grow_with_the_text() -> None:
    overlap = Overlap(heldout_bytes=32 << 20, limit=10_000)
    block = noise(0, 1 << 20)
    tracemalloc.start()
    try:
        assert sum(map(len, overlap.heldout([block] * 4))) == 4 << 20
        assert sum(map(len, overlap.train([block] * 2))) == 2 << 20
        assert tracemalloc.get_traced_memory()[1] < 24 << 20
    finally:
        tracemalloc.stop()
    assert overlap.share().value == 1
