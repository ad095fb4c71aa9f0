"""Batches: pure functions of (step, slot), the same for any number of ranks; held-out windows; generated data."""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from moetrain.config.schema import Config, DataConfig, RunConfig, TrainConfig
from moetrain.data.batch import HELDOUT_IDS
from moetrain.data.loader import Batch, Dataset, Loader, SyntheticDataset, TokenDataset, build_dataset
from moetrain.data.prepared import Prepared, SplitWriter, open_prepared, write_description
from moetrain.errors import DataError

DOMAINS = ("big", "small")
LENGTHS = {"train": ((40, 300, 7, 160), (60, 45)), "heldout": ((90, 60), (5,))}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Token = its own address in its split modulo 250, documents closed by 256, shards of 64 tokens."""
    folder = tmp_path_factory.mktemp("prepared")
    counts = {}
    for split, domains in LENGTHS.items():
        writer = SplitWriter(folder=folder, split=split, vocab_size=257, domains=DOMAINS, shard_tokens=64)
        address = 0
        for domain, lengths in enumerate(domains):
            for length in lengths:
                ids = np.append(np.arange(address, address + length - 1) % 250, 256)
                writer.add(ids, domain, length - 1)
                address += length
        writer.flush()
        counts[split] = writer.counts
    write_description(folder, {"fingerprint": "abc", "tokenizer": "bytes", "vocab_size": 257, "domains": list(DOMAINS),
                               "end_id": 256, "heldout_overlap": 0.0, **counts})
    return open_prepared(folder, verify=True)


def dataset(prepared: Prepared, seq_len: int = 10, **changes: object) -> TokenDataset:
    settings = {"seq_len": seq_len, "global_batch": 8, "seed": 0, **changes}
    return TokenDataset(prepared=prepared, **settings)


def synthetic(**changes: object) -> SyntheticDataset:
    settings = {"vocab_size": 64, "num_domains": 4, "seq_len": 32, "global_batch": 8, "seed": 0, "min_length": 0.5}
    return SyntheticDataset(**(settings | changes))


def same(first: Batch, second: Batch) -> bool:
    return all(torch.equal(one, two) for one, two in zip(first, second) if one is not None)


def test_every_window_comes_once_an_epoch_and_epochs_differ(prepared: Prepared) -> None:
    data = dataset(prepared)
    assert data.windows == (507 - 1) // 10 + (105 - 1) // 10
    drawn = np.concatenate([data.sample_ids(step, range(8)) for step in range(1, 2 + 2 * data.windows // 8)])
    first, second = drawn[:data.windows], drawn[data.windows:2 * data.windows]
    assert sorted(first) == sorted(second) == list(range(data.windows)) and first.tolist() != second.tolist()


def test_windows_are_consecutive_tokens_of_one_domain(prepared: Prepared) -> None:
    data = dataset(prepared)
    batch = data.batch(np.arange(data.windows))
    stream = prepared.train.read(0, prepared.train.size).astype(np.int64)
    starts = [10 * number for number in range(50)] + [507 + 10 * number for number in range(10)]
    for row, start in enumerate(starts):
        assert batch.tokens_BS[row].tolist() == stream[start:start + 10].tolist()
        assert batch.targets_BS[row].tolist() == stream[start + 1:start + 11].tolist()
    assert batch.domains_B.tolist() == [0] * 50 + [1] * 10 and batch.valid_BS.all() and batch.documents_BS is None
    assert batch.sample_ids_B.tolist() == list(range(60))
    integers = (batch.tokens_BS, batch.targets_BS, batch.sample_ids_B, batch.domains_B)
    assert {tensor.dtype for tensor in integers} == {torch.int64}


@pytest.mark.parametrize("mixture", ["proportional", "uniform"])
def test_sample_ids_are_a_pure_function_of_step_and_slot(prepared: Prepared, mixture: str) -> None:
    data = dataset(prepared, mixture=mixture)
    steps = {step: data.sample_ids(step, range(8)) for step in (1, 2, 30, 7, 1000)}
    again = dataset(prepared, mixture=mixture)
    for step in sorted(steps, reverse=True):
        one_by_one = [int(again.sample_ids(step, range(slot, slot + 1))[0]) for slot in (7, 3, 0, 1, 2, 4, 5, 6)]
        assert steps[step][[7, 3, 0, 1, 2, 4, 5, 6]].tolist() == one_by_one
    other = dataset(prepared, mixture=mixture, seed=1)
    assert steps[1].tolist() != other.sample_ids(1, range(8)).tolist()


def test_the_order_is_the_one_of_the_first_release(prepared: Prepared) -> None:
    """A resumed run must find its data where an older moetrain left it: a change here breaks every resume."""
    assert dataset(prepared).sample_ids(3, range(8)).tolist() == [11, 13, 51, 47, 55, 12, 26, 35]
    assert dataset(prepared, mixture="uniform").sample_ids(3, range(8)).tolist() == [48, 57, 59, 28, 1, 58, 50, 0]


def test_uniform_mixture_is_balanced_in_every_block_and_in_own_epochs(prepared: Prepared) -> None:
    data = dataset(prepared, mixture="uniform")
    ids = np.concatenate([data.sample_ids(step, range(8)) for step in range(1, 26)])       # 200 samples, 100 a domain
    domains = data.batch(ids).domains_B.view(-1, 2)
    assert (domains.sum(1) == 1).all() and 0 < domains[:, 0].sum() < 100                   # both orders occur
    small = ids[ids >= 50]
    assert all(sorted(small[start:start + 10]) == list(range(50, 60)) for start in range(0, 100, 10))
    assert sorted(Counter(ids[ids < 50].tolist()).values()) == [2] * 50


def test_weights_name_domains_and_leave_some_out(prepared: Prepared) -> None:
    data = dataset(prepared, mixture="uniform", weights={"small": 3})
    ids = np.concatenate([data.sample_ids(step, range(8)) for step in range(1, 26)])
    assert (ids >= 50).sum() == 150 and dataset(prepared, weights={}).sample_ids(1, range(8)).tolist() == \
        dataset(prepared, weights={"big": 1}).sample_ids(1, range(8)).tolist()
    only = dataset(prepared, seq_len=200, mixture="uniform", weights={"small": 0})          # too short, and not needed
    assert set(only.sample_ids(1, range(8)).tolist()) == {0, 1} and sum(len(b.tokens_BS) for b in only.heldout(1, windows=4, batch=4)) == 1
    with pytest.raises(DataError, match="E-DATA-100") as caught:
        dataset(prepared, weights={"smal": 2.0})
    assert caught.value.next == "'data.weights={small: 2}'"
    with pytest.raises(DataError, match="E-DATA-101"):
        dataset(prepared, weights={"small": 0, "big": 0})


@pytest.mark.parametrize("make", [dataset, lambda prepared: dataset(prepared, weights={"small": 2.5}), lambda _: synthetic()],
                         ids=["tokens", "weighted", "synthetic"])
@pytest.mark.parametrize("ranks, micro_batch", [(1, 8), (1, 2), (2, 2), (4, 2), (8, 1), (2, 4)])
def test_the_number_of_ranks_decides_only_who_reads(prepared: Prepared, make, ranks: int, micro_batch: int) -> None:
    data: Dataset = make(prepared)
    whole = Loader(data, global_batch=8, micro_batch=8, rank=0, ranks=1).step(5)[0]
    loaders = [Loader(data, global_batch=8, micro_batch=micro_batch, rank=rank, ranks=ranks) for rank in range(ranks)]
    micro = [loader.step(5) for loader in loaders]
    assert {len(batches) for batches in micro} == {8 // (ranks * micro_batch)}
    in_slot_order = [micro[rank][number] for number in range(len(micro[0])) for rank in range(ranks)]
    joined = [torch.cat(parts) for parts in zip(*(batch[:5] for batch in in_slot_order))]
    assert all(torch.equal(one, two) for one, two in zip(joined, whole))


def test_documents_are_numbered_inside_a_window(prepared: Prepared) -> None:
    data = dataset(prepared, seq_len=50, mask_documents=True)
    batch = data.batch(np.array([0, 6]))
    assert batch.documents_BS[0].tolist() == [0] * 40 + [1] * 10            # document of 40 tokens, then one of 300
    assert batch.documents_BS[1].tolist() == [0] * 40 + [1] * 7 + [2] * 3   # 300 … 340 | 347 |
    assert batch.tokens_BS[0, 39] == 256 and batch.targets_BS[0, 39] == 40


def test_heldout_windows_do_not_overlap_and_are_the_same_every_time(prepared: Prepared) -> None:
    data = dataset(prepared)
    batches = list(data.heldout(0, windows=6, batch=4))
    assert [len(batch.tokens_BS) for batch in batches] == [4, 2]
    assert all(same(*pair) for pair in zip(batches, data.heldout(0, windows=6, batch=4)))
    chosen = data.heldout_windows(0, 6)
    assert (np.diff(chosen.starts) >= 10).all() and chosen.starts[-1] >= 100 and set(chosen.lengths) == {10}
    ids = torch.cat([batch.sample_ids_B for batch in batches])
    assert (ids >= HELDOUT_IDS).all() and len(set(ids.tolist())) == 6
    stream = prepared.heldout.read(0, prepared.heldout.size)
    assert batches[1].targets_BS[1].tolist() == stream[chosen.starts[5] + 1:chosen.starts[5] + 11].tolist()


def test_a_short_domain_gives_all_it_has_with_padding(prepared: Prepared) -> None:
    data = dataset(prepared)
    (batch,) = data.heldout(1, windows=32, batch=16)
    assert batch.tokens_BS.shape == (1, 10) and batch.valid_BS.sum() == 4
    assert batch.targets_BS[0, 3:].tolist() == [256] + [-1] * 6 and (batch.tokens_BS[0, 4:] == 0).all()
    assert data.bytes_of_targets(batch) == 3                                # the end of the document is no byte
    everything = list(data.heldout(0, windows=99, batch=4))
    assert sum(int(part.valid_BS.sum()) for part in everything) == 149
    assert sum(data.bytes_of_targets(part) for part in everything) == 149 - 2


@pytest.mark.parametrize("mixture, seq_len, number", [("proportional", 507, "506"), ("uniform", 105, "104")])
def test_a_sequence_longer_than_the_text_is_refused(prepared: Prepared, mixture: str, seq_len: int,
                                                    number: str) -> None:
    with pytest.raises(DataError) as caught:
        dataset(prepared, seq_len=seq_len, mixture=mixture)
    assert caught.value.id == "E-DATA-050" and f"train.seq_len={number}" in caught.value.next
    dataset(prepared, seq_len=int(number), mixture=mixture)


def config(kind: str, path: Path | None = None, **data: object) -> Config:
    return Config(data=DataConfig(kind=kind, path=str(path) if path else None, **data),
                  train=TrainConfig(global_batch=8, micro_batch=8, seq_len=10), run=RunConfig(seed=0))


def test_build_dataset_opens_tokens_with_verification(prepared: Prepared, tmp_path: Path) -> None:
    built = build_dataset(config("tokens", prepared.folder), tmp_path, None)
    assert same(built.batch(np.arange(3)), dataset(prepared).batch(np.arange(3)))
    assert built.vocab_size == 257 and built.domains == DOMAINS and built.fingerprint == "abc"
    copy = Path(shutil.copytree(prepared.folder, tmp_path / "copy"))
    damaged = copy / "train-00003.tokens"
    raw = bytearray(damaged.read_bytes())
    raw[-1] ^= 1
    damaged.write_bytes(raw)
    with pytest.raises(DataError, match="train-00003.tokens"):
        build_dataset(config("tokens", copy), tmp_path, None)
    damaged.write_bytes(b"")
    with pytest.raises(DataError, match="E-DATA-002"):
        build_dataset(config("tokens", damaged), tmp_path, None)
    with pytest.raises(DataError, match="E-DATA-010"):
        build_dataset(config("tokens", tmp_path), tmp_path, None)
    with pytest.raises(DataError, match="E-DATA-052"):
        build_dataset(config("tokens"), tmp_path, None)
    with pytest.raises(DataError, match="E-DATA-051"):
        build_dataset(config("text"), tmp_path, None)


def test_build_dataset_generates(tmp_path: Path) -> None:
    built = build_dataset(config("synthetic", vocab_size=50, num_domains=3), tmp_path, None)
    batch = Loader(built, global_batch=8, micro_batch=4, rank=1, ranks=2).step(1)[0]
    assert batch.tokens_BS.shape == (4, 10) and batch.tokens_BS.max() < 50 and len(built.domains) == 3


def test_generated_samples_depend_on_seed_and_id_alone() -> None:
    data = synthetic()
    ids = data.sample_ids(3, range(8))
    assert ids.tolist() == list(range(16, 24))
    batch = data.batch(ids)
    assert same(batch, synthetic().batch(ids)) and not same(batch, synthetic(seed=1).batch(ids))
    alone = data.batch(ids[5:6])
    assert alone.tokens_BS[0].tolist() == batch.tokens_BS[5].tolist() and alone.domains_B[0] == batch.domains_B[5]


def test_generated_lengths_domains_and_padding() -> None:
    data = synthetic()
    batch = data.batch(np.arange(400))
    lengths = batch.valid_BS.sum(1)
    assert lengths.min() == 16 and lengths.max() == 32
    assert (batch.valid_BS == (torch.arange(32) < lengths[:, None])).all()
    assert (batch.targets_BS[~batch.valid_BS] == -1).all() and (batch.tokens_BS[~batch.valid_BS] == 0).all()
    assert (torch.bincount(batch.domains_B) > 60).all() and data.bytes_of_targets(batch) == lengths.sum()
    both = batch.valid_BS[:, 1:]
    assert torch.equal(batch.tokens_BS[:, 1:][both], batch.targets_BS[:, :-1][both])
    assert synthetic(min_length=1.0).batch(np.arange(9)).valid_BS.all()


def test_generated_domains_are_predictable_and_differ() -> None:
    """The best successor of a token, counted on one half, is right for about 70 % of the other half."""
    data = synthetic(min_length=1.0)
    alphabets = []
    for domain in range(4):
        (batch,) = data.heldout(domain, windows=60, batch=60)
        assert (batch.domains_B == domain).all() and (batch.sample_ids_B >= HELDOUT_IDS).all()
        pairs = torch.zeros(64, 64).index_put_((batch.tokens_BS[:30].flatten(), batch.targets_BS[:30].flatten()),
                                               torch.ones(30 * 32), accumulate=True)
        right = pairs.argmax(1)[batch.tokens_BS[30:]] == batch.targets_BS[30:]
        assert right.float().mean() > 0.6
        alphabets.append(set(batch.tokens_BS.unique().tolist()))
    assert len(set.union(*alphabets)) == sum(map(len, alphabets)) == 64


@pytest.mark.parametrize("vocab_size, num_domains", [(2, 5), (7, 3), (1, 1), (1000, 2)])
def test_generated_tokens_fit_any_vocabulary(vocab_size: int, num_domains: int) -> None:
    batch = synthetic(vocab_size=vocab_size, num_domains=num_domains).batch(np.arange(50))
    assert batch.tokens_BS.min() >= 0 and batch.tokens_BS.max() < vocab_size and batch.domains_B.max() < num_domains
