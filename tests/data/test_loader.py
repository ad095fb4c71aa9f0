"""Batches as pure functions of (step, slot) for any number of ranks; held-out windows; generated data."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from moetrain.config.schema import Config, DataConfig, RunConfig, TrainConfig
from moetrain.data.batches.batch import HELDOUT_IDS
from moetrain.data.loader import Batch, Dataset, Loader, SyntheticDataset, TokenDataset, build_dataset
from moetrain.data.preparation.prepared_dataset import Prepared, open_prepared, write_description
from moetrain.data.preparation.split_writer import SplitWriter
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
    write_description(folder, {"fingerprint": "abc", "tokenizer": "bytes", "vocab_size": 257,
                               "domains": list(DOMAINS), "end_id": 256, "heldout_overlap": 0.0, **counts})
    return open_prepared(folder, verify=True)


def dataset(prepared: Prepared, seq_len: int = 10, **changes: object) -> TokenDataset:
    settings = {"seq_len": seq_len, "global_batch": 8, "seed": 0, **changes}
    return TokenDataset(prepared=prepared, **settings)


def synthetic(**changes: object) -> SyntheticDataset:
    settings = {"vocab_size": 64, "num_domains": 4, "seq_len": 32, "global_batch": 8, "seed": 0,
                "min_length": 0.5}
    return SyntheticDataset(**(settings | changes))


def same(first: Batch, second: Batch) -> bool:
    return all(torch.equal(one, two) for one, two in zip(first, second) if one is not None)


def test_every_window_comes_once_an_epoch_and_epochs_differ(prepared: Prepared) -> None:
    data = dataset(prepared)
    windows = -(-data.tokens // 10)
    assert windows == 62 and data.tokens == 507 + 105
    drawn = np.concatenate([data.sample_ids(step, range(8)) for step in range(1, 2 + 2 * windows // 8)])
    first, second = drawn[:windows], drawn[windows:2 * windows]
    assert sorted(first) == sorted(second) == list(range(windows)) and first.tolist() != second.tolist()


def test_windows_are_consecutive_tokens_over_all_domains(prepared: Prepared) -> None:
    """The input of a target is the token before it; that of the very first is the last of the stream."""
    data = dataset(prepared)
    batch = data.batch(np.arange(62))
    stream = prepared.train.read(0, prepared.train.size).astype(np.int64)
    for row in range(62):
        places = np.arange(10 * row, min(10 * row + 10, 612))
        assert batch.targets_BS[row, :len(places)].tolist() == stream[places].tolist()
        assert batch.tokens_BS[row, :len(places)].tolist() == stream[places - 1].tolist()
    assert (batch.valid_BS.sum() == 612 and (batch.targets_BS[~batch.valid_BS] == -1).all()
            and batch.documents_BS is None)
    assert batch.domains_B.tolist() == [0] * 51 + [1] * 11  # 507 … 509 of window 50 are of the second
    assert batch.sample_ids_B.tolist() == list(range(62))
    integers = (batch.tokens_BS, batch.targets_BS, batch.sample_ids_B, batch.domains_B)
    assert {tensor.dtype for tensor in integers} == {torch.int64}


@pytest.mark.parametrize("mixture", ["proportional", "uniform"])
def test_sample_ids_are_a_pure_function_of_step_and_slot(prepared: Prepared, mixture: str) -> None:
    data = dataset(prepared, mixture=mixture)
    steps = {step: data.sample_ids(step, range(8)) for step in (1, 2, 30, 7, 1000)}
    again = dataset(prepared, mixture=mixture)
    for step in sorted(steps, reverse=True):
        one_by_one = [int(again.sample_ids(step, range(slot, slot + 1))[0])
                      for slot in (7, 3, 0, 1, 2, 4, 5, 6)]
        assert steps[step][[7, 3, 0, 1, 2, 4, 5, 6]].tolist() == one_by_one
    other = dataset(prepared, mixture=mixture, seed=1)
    assert steps[1].tolist() != other.sample_ids(1, range(8)).tolist()


def test_the_order_of_a_release_is_that_of_the_next(prepared: Prepared) -> None:
    """A resumed run must find its data where an older moetrain left it: a change here breaks every resume."""
    assert dataset(prepared).sample_ids(3, range(8)).tolist() == [32, 50, 58, 11, 49, 19, 30, 26]
    assert (dataset(prepared, mixture="uniform").sample_ids(3, range(8)).tolist()
            == [508, 210, 527, 525, 200, 507, 130, 270])


def test_uniform_mixture_is_balanced_in_every_step_and_in_own_epochs(prepared: Prepared) -> None:
    data = dataset(prepared, mixture="uniform")
    # 200 samples, 100 a domain
    batches = [data.batch(data.sample_ids(step, range(8))) for step in range(1, 26)]
    domains = torch.stack([batch.domains_B for batch in batches])
    assert (domains.sum(1) == 4).all() and len({tuple(row) for row in domains.tolist()}) > 10
    assert all(batch.valid_BS.all() for batch in batches)
    for domain, size in enumerate((507, 105)):
        rows = torch.cat([batch.targets_BS[batch.domains_B == domain] for batch in batches])
        assert (len(rows) == 100
                and prepared.train.domain_range(domain)[1] - prepared.train.domain_range(domain)[0] == size)
    assert data.epochs(200).tolist() == pytest.approx([1000 / 507, 1000 / 105])


def test_weights_name_domains_and_leave_some_out(prepared: Prepared) -> None:
    data = dataset(prepared, mixture="uniform", weights={"small": 3})
    batches = [data.batch(data.sample_ids(step, range(8))) for step in range(1, 26)]
    assert sum(int((batch.domains_B == 1).sum()) for batch in batches) == 150
    assert data.epochs(200).tolist() == pytest.approx([500 / 507, 1500 / 105])
    assert dataset(prepared, weights={}).sample_ids(1, range(8)).tolist() == \
        dataset(prepared, weights={"big": 1}).sample_ids(1, range(8)).tolist()
    # too short, and not needed
    only = dataset(prepared, seq_len=200, mixture="uniform", weights={"small": 0})
    assert (set(only.sample_ids(1, range(8)).tolist()) == {0, 1, 2} and only.tokens == 507
            and only.epochs(6).tolist() == [2, 0])
    assert sum(len(b.tokens_BS) for b in only.heldout(1, windows=4, batch=4)) == 1
    with pytest.raises(DataError, match="E-DATA-100") as caught:
        dataset(prepared, weights={"smal": 2.0})
    assert caught.value.next == "'data.weights={small: 2}'"
    with pytest.raises(DataError, match="E-DATA-101"):
        dataset(prepared, weights={"small": 0, "big": 0})


@pytest.mark.parametrize("make",
                         [dataset, lambda prepared: dataset(prepared,
                                                            weights={"small": 2.5}), lambda _: synthetic()],
                         ids=["tokens", "weighted", "synthetic"])
@pytest.mark.parametrize("ranks, micro_batch", [(1, 8), (1, 2), (2, 2), (4, 2), (8, 1), (2, 4)])
def test_the_number_of_ranks_decides_only_who_reads(prepared: Prepared, make, ranks: int,
                                                    micro_batch: int) -> None:
    data: Dataset = make(prepared)
    whole = Loader(data, global_batch=8, micro_batch=8, rank=0, ranks=1).step(5)[0]
    loaders = [Loader(data, global_batch=8, micro_batch=micro_batch, rank=rank, ranks=ranks)
               for rank in range(ranks)]
    micro = [loader.step(5) for loader in loaders]
    assert {len(batches) for batches in micro} == {8 // (ranks * micro_batch)}
    in_slot_order = [micro[rank][number] for number in range(len(micro[0])) for rank in range(ranks)]
    joined = [torch.cat(parts) for parts in zip(*(batch[:5] for batch in in_slot_order))]
    assert all(torch.equal(one, two) for one, two in zip(joined, whole))


def test_documents_are_numbered_inside_a_window(prepared: Prepared) -> None:
    """By the input: the end id belongs to its document, and so does the token after it as a target."""
    data = dataset(prepared, seq_len=50, mask_documents=True)
    batch = data.batch(np.array([0, 6, 12]))
    # last document, one of 40 tokens, one of 300
    assert batch.documents_BS[0].tolist() == [0] + [1] * 40 + [2] * 9
    assert batch.documents_BS[1].tolist() == [0] * 41 + [1] * 7 + [2] * 2   # inputs 299 … 339 | … 346 | …
    assert batch.tokens_BS[0, 40] == 256 and batch.targets_BS[0, 40] == 40
    assert batch.documents_BS[2].tolist() == [0] * 13 + [0] * 37            # the last is not full


def test_text_that_comes_again_in_a_window_is_another_document(prepared: Prepared) -> None:
    data = dataset(prepared, seq_len=120, mixture="uniform", mask_documents=True)
    small = next(id for id in data.sample_ids(1, range(8)) if data.batch(np.array([id])).domains_B == 1)
    batch = data.batch(np.array([small]))
    assert batch.valid_BS.all() and batch.targets_BS[0, :15].tolist() == batch.targets_BS[0, 105:].tolist()
    ids = batch.documents_BS[0]
    assert ids[0] == 0 and (ids.diff() >= 0).all() and (ids[105:] > ids[:15]).all()


def test_heldout_windows_do_not_overlap_and_are_the_same_every_time(prepared: Prepared) -> None:
    data = dataset(prepared)
    batches = list(data.heldout(0, windows=6, batch=4))
    assert [len(batch.tokens_BS) for batch in batches] == [4, 2]
    assert all(same(*pair) for pair in zip(batches, data.heldout(0, windows=6, batch=4)))
    ids = data.heldout_ids(0, 6)
    assert ((ids >= HELDOUT_IDS).all()
            and ids.tolist() == torch.cat([batch.sample_ids_B for batch in batches]).tolist())
    pieces = [data.pieces(id) for id in ids.tolist()]
    assert all(len(piece) == 1 and piece[0].length == 10 for piece in pieces)
    starts = np.array([piece[0].start for piece in pieces])
    assert (np.diff(starts) >= 10).all() and starts[-1] >= 100
    stream = prepared.heldout.read(0, prepared.heldout.size)
    assert batches[1].targets_BS[1].tolist() == stream[starts[5]:starts[5] + 10].tolist()
    assert batches[1].tokens_BS[1].tolist() == stream[starts[5] - 1:starts[5] + 9].tolist()


def test_every_heldout_token_is_a_target_once(prepared: Prepared) -> None:
    data = dataset(prepared)
    (batch,) = data.heldout(1, windows=32, batch=16)
    assert batch.tokens_BS.shape == (1, 10) and batch.valid_BS.sum() == 5
    assert (batch.targets_BS[0].tolist() == [150, 151, 152, 153, 256] + [-1] * 5
            and (batch.tokens_BS[0, 5:] == 0).all())
    assert batch.tokens_BS[0, 0] == 256                                     # where the domain before it ends
    assert data.bytes_of_targets(batch) == 4  # the end of the document is no byte
    everything = list(data.heldout(0, windows=99, batch=4))
    assert sum(int(part.valid_BS.sum()) for part in everything) == 150
    assert sum(data.bytes_of_targets(part) for part in everything) == 150 - 2


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
    assert (alone.tokens_BS[0].tolist() == batch.tokens_BS[5].tolist()
            and alone.domains_B[0] == batch.domains_B[5])


def test_generated_lengths_domains_and_padding() -> None:
    data = synthetic()
    batch = data.batch(np.arange(400))
    lengths = batch.valid_BS.sum(1)
    assert lengths.min() == 16 and lengths.max() == 32
    assert (batch.valid_BS == (torch.arange(32) < lengths[:, None])).all()
    assert (batch.targets_BS[~batch.valid_BS] == -1).all() and (batch.tokens_BS[~batch.valid_BS] == 0).all()
    assert (torch.bincount(batch.domains_B) > 60).all() and data.bytes_of_targets(batch) is None
    both = batch.valid_BS[:, 1:]
    assert torch.equal(batch.tokens_BS[:, 1:][both], batch.targets_BS[:, :-1][both])
    assert synthetic(min_length=1.0).batch(np.arange(9)).valid_BS.all()


def test_generated_domains_are_predictable_and_differ() -> None:
    """The best successor of a token, counted on one half, is right for about 70 % of the other half."""
    data = synthetic(min_length=1.0)
    alphabets = []
    for domain in range(4):
        batch = data.batch(data.heldout_ids(domain, 60))
        assert (batch.domains_B == domain).all() and (batch.sample_ids_B >= HELDOUT_IDS).all()
        pairs = torch.zeros(64, 64).index_put_((batch.tokens_BS[:30].flatten(),
                                                batch.targets_BS[:30].flatten()),
                                               torch.ones(30 * 32), accumulate=True)
        right = pairs.argmax(1)[batch.tokens_BS[30:]] == batch.targets_BS[30:]
        assert right.float().mean() > 0.6
        alphabets.append(set(batch.tokens_BS.unique().tolist()))
    assert len(set.union(*alphabets)) == sum(map(len, alphabets)) == 64


@pytest.mark.parametrize("vocab_size, num_domains", [(2, 5), (7, 3), (1, 1), (1000, 2)])
def test_generated_tokens_fit_any_vocabulary(vocab_size: int, num_domains: int) -> None:
    batch = synthetic(vocab_size=vocab_size, num_domains=num_domains).batch(np.arange(50))
    assert (batch.tokens_BS.min() >= 0 and batch.tokens_BS.max() < vocab_size
            and batch.domains_B.max() < num_domains)
