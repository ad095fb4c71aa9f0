"""In every mixture, with domains of any size and any number of ranks, a token is a target once an epoch."""

import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from moetrain.data.batches.batch import DOMAIN_IDS, HELDOUT_IDS, Batch
from moetrain.data.batches.evaluated_domains import MOST_NAMED, OTHERS
from moetrain.data.loader import Loader, TokenDataset
from moetrain.data.preparation.prepared_dataset import Prepared, open_prepared, write_description
from moetrain.data.preparation.split_writer import SplitWriter
from moetrain.errors import DataError

PROPERTIES = settings(max_examples=25, deadline=None, derandomize=True)


def numbered(folder: Path, train: list[int], heldout: list[int] | None = None) -> Prepared:
    """Domains of so many tokens, in documents of at most 50; a token is its own address in its split."""
    folder.mkdir(exist_ok=True)
    heldout = heldout or [1] * len(train)
    names = tuple(f"d{number:04d}" for number in range(len(train)))
    vocab_size, counts = max(sum(train), sum(heldout), 257), {}
    for split, sizes in (("train", train), ("heldout", heldout)):
        writer = SplitWriter(folder=folder, split=split, vocab_size=vocab_size, domains=names,
                             shard_tokens=4096)
        ends = np.cumsum(sizes)
        for domain, (size, end) in enumerate(zip(sizes, ends.tolist())):
            for first in range(end - size, end, 50):
                writer.add(np.arange(first, min(first + 50, end)), domain, 1)
        writer.flush()
        counts[split] = writer.counts
    write_description(folder, {"fingerprint": f"{train} {heldout}", "tokenizer": "bytes",
                               "vocab_size": vocab_size, "domains": list(names), "heldout_overlap": 0.0,
                               **counts})
    return open_prepared(folder, verify=False)


def dataset(prepared: Prepared, **changes: object) -> TokenDataset:
    return TokenDataset(prepared=prepared, **{"seq_len": 16, "global_batch": 8, "seed": 0, **changes})


class Case(NamedTuple):
    sizes: list[int]
    seq_len: int
    mixture: str
    weights: list[float]
    ranks: int
    micro_batch: int
    mask: bool


cases = st.integers(1, 7).flatmap(lambda count: st.builds(
    Case, st.lists(st.one_of(st.integers(0, 6), st.integers(0, 300)), min_size=count,
                   max_size=count).filter(any), st.integers(1, 40),
    st.sampled_from(["proportional", "uniform"]),
    st.one_of(st.just([1.0] * count), st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.0, 3.0]), min_size=count,
                                               max_size=count)),
    st.sampled_from([1, 2, 3]), st.integers(1, 3), st.booleans()))


def step_of(loaders: list[Loader], step: int) -> list[Batch]:
    return [batch for loader in loaders for batch in loader.step(step)]


@PROPERTIES
@given(case=cases)
def test_every_token_is_a_target_as_often_as_any_other_of_its_domain(case: Case) -> None:
    """After every step; its input is the token before it; and domains come by their shares."""
    with tempfile.TemporaryDirectory() as folder:
        prepared = numbered(Path(folder), case.sizes)
        global_batch = case.ranks * case.micro_batch * 2
        settings = {"seq_len": case.seq_len, "global_batch": global_batch, "mixture": case.mixture,
                    "mask_documents": case.mask, "weights": dict(zip(prepared.domains, case.weights))}
        used = [size if weight else 0 for size, weight in zip(case.sizes, case.weights)]
        if not any(used):
            with pytest.raises(DataError, match="E-DATA-101"):
                dataset(prepared, **settings)
            return
        data = dataset(prepared, **settings)
        loaders = [Loader(data, global_batch=global_batch, micro_batch=case.micro_batch, rank=rank,
                          ranks=case.ranks)
                   for rank in range(case.ranks)]
        total, counts, steps = sum(case.sizes), np.zeros(sum(case.sizes), np.int64), 0
        while steps < 12 or counts.sum() < 2 * sum(used) and steps < 40:
            steps += 1
            for batch in step_of(loaders, steps):
                targets = batch.targets_BS[batch.valid_BS].numpy()
                inputs = batch.tokens_BS[batch.valid_BS].numpy()
                assert (inputs == (targets - 1) % total).all()
                counts += np.bincount(targets, minlength=total)
            for domain in np.split(counts, np.cumsum(case.sizes)[:-1]):
                assert not len(domain) or domain.max() - domain.min() <= 1
        by_domain = np.array([part.sum() for part in np.split(counts, np.cumsum(case.sizes)[:-1])])
        check_shares(case, used, by_domain, data.epochs(steps * global_batch), steps * global_batch)


def check_shares(case: Case, used: list[int], by_domain: np.ndarray, epochs: np.ndarray, rows: int) -> None:
    """Uniform domains that fill windows of their own come by their weights, give or take a few windows."""
    due = rows * case.seq_len * np.array(case.weights) * (np.array(used) > 0)
    due /= (np.array(case.weights) * (np.array(used) > 0)).sum()
    assert ((epochs > 0) == (np.array(used) > 0)).all()
    for domain, size in enumerate(used):
        if case.mixture == "uniform" and size >= case.seq_len and np.count_nonzero(used) > 1:
            assert abs(by_domain[domain] - due[domain]) <= 4 * case.seq_len
            assert epochs[domain] * size == pytest.approx(due[domain])


@PROPERTIES
@given(sizes=st.lists(st.integers(0, 400), min_size=1, max_size=30).filter(any), seq_len=st.integers(1, 70))
def test_an_epoch_of_the_proportional_mixture_is_every_token_once(sizes: list[int], seq_len: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = dataset(numbered(Path(folder), sizes), seq_len=seq_len)
        windows = -(-data.tokens // seq_len)
        steps = range(1, 2 + 2 * windows // 8)
        ids = np.concatenate([data.sample_ids(step, range(8)) for step in steps])[:2 * windows]
        for epoch in np.split(ids, 2):
            batch = data.batch(epoch)
            assert sorted(batch.targets_BS[batch.valid_BS].tolist()) == list(range(sum(sizes)))
            assert int((~batch.valid_BS).sum()) < seq_len            # at most one window is not full


@pytest.mark.parametrize("mixture", ["proportional", "uniform"])
def test_the_documents_of_many_small_domains_are_all_trained_on(tmp_path: Path, mixture: str) -> None:
    """400 objects of a domain of their own and a large one: 94 % of the tokens were once in no window."""
    data = dataset(numbered(tmp_path, [90] * 400 + [4000]), seq_len=300, mixture=mixture, global_batch=134)
    assert -(-data.tokens // 300) == 134
    # uniform: a window in 401 is of the large one, which has 14
    steps = range(1, 2 if mixture == "proportional" else 42)
    rows = [data.pieces(id) for step in steps for id in data.sample_ids(step, range(134)).tolist()]
    seen = {place for row in rows for start, length in row for place in range(start, start + length)}
    assert seen == set(range(40_000))
    assert sum(length for row in rows for _, length in row) >= 0.99 * len(rows) * 300


def test_every_repetition_of_a_single_token_is_a_document_of_its_own(tmp_path: Path) -> None:
    data = dataset(numbered(tmp_path, [40, 1]), seq_len=8, mixture="uniform", mask_documents=True)
    batch = data.batch(data.sample_ids(1, range(8)))
    (alone, *_) = torch.nonzero(batch.domains_B == 1).flatten().tolist()
    assert batch.targets_BS[alone].tolist() == [40] * 8 and batch.tokens_BS[alone].tolist() == [39] * 8
    assert batch.documents_BS[alone].tolist() == list(range(8))


def test_the_main_domain_of_a_window_has_most_of_its_targets(tmp_path: Path) -> None:
    data = dataset(numbered(tmp_path, [20, 0, 4, 4, 8]), seq_len=16)
    assert data.batch(np.arange(3)).domains_B.tolist() == [0, 0, 4]
    assert dataset(numbered(tmp_path / "b", [8, 8]), seq_len=16).batch(np.arange(1)).domains_B.tolist() == [0]


def test_a_text_without_a_token_is_refused_and_one_token_is_enough(tmp_path: Path) -> None:
    data = dataset(numbered(tmp_path / "one", [1]), seq_len=512)
    batch = data.batch(data.sample_ids(1, range(8)))
    assert batch.valid_BS.sum(1).tolist() == [1] * 8 and data.epochs(8).tolist() == [8]
    prepared = numbered(tmp_path / "none", [1])
    prepared.train.size, prepared.train.domain_bounds = 0, np.zeros(2, np.int64)
    with pytest.raises(DataError, match="E-DATA-050"):
        dataset(prepared)


@PROPERTIES
@given(sizes=st.lists(st.integers(0, 90), min_size=1, max_size=60).filter(any), seq_len=st.integers(1, 40))
def test_all_heldout_windows_are_the_heldout_text(sizes: list[int], seq_len: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = dataset(numbered(Path(folder), [1] * len(sizes), sizes), seq_len=seq_len)
        targets, ids = [], []
        for part in range(len(data.measured)):
            for batch in data.heldout(part, windows=sum(sizes), batch=5):
                assert (batch.tokens_BS == (batch.targets_BS - 1) % sum(sizes))[batch.valid_BS].all()
                targets += batch.targets_BS[batch.valid_BS].tolist()
                ids += batch.sample_ids_B.tolist()
        assert (sorted(targets) == list(range(sum(sizes))) and len(set(ids)) == len(ids)
                and min(ids) >= HELDOUT_IDS)


def test_of_many_domains_the_small_ones_are_measured_together(tmp_path: Path) -> None:
    sizes = [700 + (number % 7 == 0) * (40 - number) for number in range(40)]
    data = dataset(numbered(tmp_path, [1] * 40, sizes), seq_len=32)
    assert (len(data.measured) == MOST_NAMED + 1 and data.measured[-1] == OTHERS
            and data.measured[0] == "d0000")
    assert ([data.measured[part] for part in range(MOST_NAMED)]
            == [f"d{number:04d}" for number in (*range(31), 35)])
    pooled = data.heldout_ids(MOST_NAMED, 12)
    (batch,) = data.heldout(MOST_NAMED, windows=12, batch=12)
    assert ((pooled >= HELDOUT_IDS + MOST_NAMED * DOMAIN_IDS).all() and batch.valid_BS.all()
            and len(torch.unique(batch.targets_BS)) == 12 * 32)
    assert set(batch.domains_B.tolist()) == {31, 32, 33, 34, 36, 37, 38, 39}  # spread over all of them
