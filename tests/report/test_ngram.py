"""Witten-Bell models equal a slow implementation with dictionaries, and have the properties of any model."""

import math
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from moetrain.data.batches.token_dataset import TokenDataset
from moetrain.data.preparation.prepared_dataset import open_prepared, write_description
from moetrain.data.preparation.split_writer import SplitWriter
from moetrain.report import ngram
from moetrain.report.ngram import mean_over_domains, witten_bell

DOMAINS = ("a", "b", "nothing")


def slow(train: list[int], context: list[int], token: int, vocab: int) -> float:
    """Compute P(token | context) by the formula, counting every time."""
    probability = 1 / vocab
    for k in range(len(context) + 1):
        history = tuple(context[len(context) - k:])
        after = Counter(train[at] for at in range(k, len(train)) if tuple(train[at - k:at]) == history)
        if after:
            total, types = sum(after.values()), len(after)
            probability = (after[token] + types * probability) / (total + types)
    return probability


def tiny(folder: Path, vocab_size: int, seq_len: int) -> TokenDataset:
    """Prepare two domains of noisy repetition and one without held-out text; ids span the vocabulary."""
    chance = np.random.default_rng(0)
    spread = np.append(np.sort(chance.choice(vocab_size - 1, 8, replace=False)), vocab_size - 1)
    counts = {}
    for split, lengths in (("train", ((150, 60), (90,), (30,))), ("heldout", ((40, 20), (23,), ()))):
        writer = SplitWriter(folder=folder, split=split, vocab_size=vocab_size, domains=DOMAINS,
                             shard_tokens=64)
        for domain, sizes in enumerate(lengths):
            for size in sizes:
                regular, noise = np.arange(size) * (domain + 1) % 5, chance.integers(0, 8, size)
                ids = np.where(chance.random(size) < 0.7, regular, noise)
                writer.add(np.append(spread[ids], spread[-1]), domain, size)
        writer.flush()
        counts[split] = writer.counts
    write_description(folder, {"fingerprint": "abc", "tokenizer": "bytes", "vocab_size": vocab_size,
                               "domains": list(DOMAINS), "heldout_overlap": 0.0, **counts})
    prepared = open_prepared(folder, verify=True)
    return TokenDataset(prepared=prepared, seq_len=seq_len, global_batch=2, seed=0)


@pytest.mark.parametrize("vocab_size, chunk, windows", [(257, 1 << 22, 3), (257, 37, 99), (9, 50, 99)])
def test_fast_and_slow_models_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vocab_size: int,
                                    chunk: int, windows: int) -> None:
    monkeypatch.setattr(ngram, "_CHUNK", chunk)
    data = tiny(tmp_path, vocab_size, seq_len=7)
    result = witten_bell(data, windows=windows, batch=2, order=4)
    assert list(result) == ["a", "b"]
    train = data.train_stream.read(0, data.train_stream.size).tolist()
    heldout = data.heldout_stream.read(0, data.heldout_stream.size).tolist()
    for domain, name in enumerate(result):
        first = data.heldout_stream.domain_range(domain)[0]
        batches = list(data.heldout(domain, windows=windows, batch=2))
        size = sum(data.bytes_of_targets(batch) for batch in batches)
        targets = [at for number in data.heldout_ids(domain, windows).tolist()
                   for start, length in data.pieces(number)
                   for at in range(start, start + length)]
        assert len(targets) == sum(int(batch.valid_BS.sum()) for batch in batches)
        ids = [int(id) for batch in batches for id in batch.targets_BS[batch.valid_BS]]
        assert [heldout[at] for at in targets] == ids
        for order in range(5):
            chances = [slow(train, heldout[max(first, at - order):at], heldout[at], vocab_size)
                       for at in targets]
            assert result[name][order] == pytest.approx(-sum(map(math.log, chances)) / size, rel=1e-9)


def test_hashed_contexts_count_like_exact_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiny(tmp_path, 257, seq_len=7)
    exact = witten_bell(data, windows=99, batch=2, order=4)
    # 257 ** 5 does not fit, so contexts are hashed from order 4 on.
    monkeypatch.setattr(ngram, "_INT64_MAX", 1 << 39)
    hashed = witten_bell(data, windows=99, batch=2, order=6)
    for name in exact:
        assert hashed[name][:5] == pytest.approx(exact[name], rel=1e-9)


def test_a_large_vocabulary_does_not_overflow(tmp_path: Path) -> None:
    data = tiny(tmp_path, 200_000, seq_len=7)
    positions = np.arange(1, 30)
    nats = ngram._nats(data, positions, 4)
    train = data.train_stream.read(0, data.train_stream.size).tolist()
    heldout = data.heldout_stream.read(0, 30).tolist()
    for column, at in enumerate(positions):
        for order in range(5):
            expected = slow(train, heldout[max(0, at - order):at], heldout[at], 200_000)
            assert nats[order, column] == pytest.approx(-math.log(expected), rel=1e-9)


def test_probabilities_of_all_tokens_add_up_to_one(tmp_path: Path) -> None:
    data = tiny(tmp_path, 9, seq_len=7)
    tokens = data.train_stream.read(0, data.train_stream.size).astype(np.int64)
    contexts = np.repeat(tokens[20:26] * 9 + tokens[21:27], 9)
    every = np.tile(np.arange(9), 6)
    probability = ngram.interpolate(ngram.count(data.train_stream, 2, 9), contexts, every, np.full(54, 1 / 9),
                                    9)
    assert probability.reshape(6, 9).sum(1) == pytest.approx(np.ones(6))


def test_counts_are_those_of_a_dictionary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngram, "_CHUNK", 41)
    data = tiny(tmp_path, 9, seq_len=7)
    tokens = data.train_stream.read(0, data.train_stream.size).tolist()
    expected: dict[int, int] = defaultdict(int)
    for one, two, three in zip(tokens, tokens[1:], tokens[2:]):
        expected[(one * 9 + two) * 9 + three] += 1
    found = ngram.count(data.train_stream, 2, 9)
    assert dict(zip(found.codes.tolist(), found.counts.tolist())) == dict(sorted(expected.items()))


def test_the_mean_is_plain() -> None:
    assert mean_over_domains({"a": [1.0, 2.0], "b": [3.0, 6.0]}) == [2.0, 4.0]
    assert mean_over_domains({}) == []
