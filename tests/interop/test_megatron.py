"""Megatron-Core's indexed datasets: windows hold what its builder wrote, and damaged files are named."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support import needs, warm_start

needs.module("megatron.core", extra="megatron")

from moetrain.config.compose import compose
from moetrain.config.schema import Config
from moetrain.data.batches.batch import HELDOUT_IDS
from moetrain.data.batches.token_dataset import TokenDataset
from moetrain.data.corpus.builtin import builtin_documents
from moetrain.data.loader import Loader, build_dataset
from moetrain.data.tokenizers.tokenizer import ByteTokenizer
from moetrain.errors import DataError
from tests.support.command_line import DEBUG, environment, numbers, weights
from tests.support.indexed_data import build, numbered

SEQ = 32


def corpus(domain: str) -> list[list[np.ndarray]]:
    """Built-in texts of a domain as bytes and an end token; every third document has two sequences."""
    encoder, found = ByteTokenizer(), []
    for number, document in enumerate(d for d in builtin_documents(domain_cap=20_000) if d.domain == domain):
        tokens = np.append(encoder.encode(document.text), encoder.end_id)
        found.append(np.array_split(tokens, 2) if number % 3 == 0 else [tokens])
    return found


@pytest.fixture(scope="module")
def domains() -> list[str]:
    return sorted({document.domain for document in builtin_documents(domain_cap=20_000)})[:2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, domains) -> Path:
    path = tmp_path_factory.mktemp("indexed")
    for domain in domains:
        build(path / domain, corpus(domain))
    return path


def config(path: Path, *overrides: str) -> Config:
    return compose(
        ["data=megatron", f"data.path={path}", f"train.seq_len={SEQ}", "data.tokenizer=bytes", *overrides])


def dataset(path: Path, *overrides: str) -> TokenDataset:
    return build_dataset(config(path, *overrides), Path("unused"), None)


def read_all(stream) -> np.ndarray:
    return stream.read(0, stream.size).astype(np.int64)


def test_every_token_is_trained_on_or_held_out_and_none_is_both(folder, domains):
    data = dataset(folder)
    assert data.domains == tuple(domains) and data.vocab_size == 257
    for index, domain in enumerate(domains):
        written = [np.concatenate(sequences) for sequences in corpus(domain)]
        parts = []
        for stream in (data.train_stream, data.heldout_stream):
            begin, end = stream.domain_range(index)
            bounds = [*(s for s in stream.document_starts.tolist() if begin <= s < end), end]
            parts.append([stream.read(a, b - a) for a, b in zip(bounds, bounds[1:])])
        assert sum(map(len, parts[0] + parts[1])) == sum(map(len, written))
        assert 0.01 < sum(map(len, parts[1])) / sum(map(len, written)) < 0.25
        if len(written) >= 20:                                       # whole documents on either side
            ours = sorted(piece.astype(np.int64).tobytes() for piece in parts[0] + parts[1])
            assert ours == sorted(tokens.tobytes() for tokens in written)


def test_a_window_holds_the_tokens_that_were_written(tmp_path):
    documents = numbered(40)
    build(tmp_path / "one", documents, np.int32)
    data = dataset(tmp_path / "one", "data.tokenizer=none", "data.vocab_size=2000")
    trained = read_all(data.train_stream)
    whole = [document[0] for document in documents]
    assert len(trained) == 38 * 50 and set(trained) | set(read_all(data.heldout_stream)) == set(range(2000))
    kept = [tokens for tokens in whole if tokens[0] in set(trained.tolist())]
    assert (trained == np.concatenate(kept)).all()                   # in the builder's order
    ids = np.array([0, 7, -(-data.tokens // SEQ) - 1])
    batch = data.batch(ids)
    for row, target, window in zip(batch.tokens_BS, batch.targets_BS, ids.tolist()):
        places = np.arange(window * SEQ, min(window * SEQ + SEQ, len(trained)))
        assert row[:len(places)].tolist() == trained[places - 1].tolist()
        assert target[:len(places)].tolist() == trained[places].tolist()
    (held,) = data.heldout(0, windows=8, batch=8)
    assert (held.sample_ids_B >= HELDOUT_IDS).all()
    assert not set(held.tokens_BS[held.valid_BS].tolist()) & set(trained.tolist())


def test_few_documents_give_up_their_last_twentieth_each(tmp_path):
    build(tmp_path / "few", [[np.arange(100), np.arange(100, 400)], [np.arange(400, 800)]], np.int32)
    data = dataset(tmp_path / "few", "data.tokenizer=none", "data.vocab_size=800", "data.mask_documents=true")
    assert read_all(data.train_stream).tolist() == [*range(380), *range(400, 780)]
    assert read_all(data.heldout_stream).tolist() == [*range(380, 400), *range(780, 800)]
    assert data.train_stream.document_starts.tolist() == [0, 380]    # two sequences, one document
    window = data.batch(np.array([380 // SEQ])).documents_BS[0]
    # Of the inputs, the first of which is at 380 - 380 % SEQ - 1.
    assert window.tolist() == [0] * (380 % SEQ + 1) + [1] * (SEQ - 380 % SEQ - 1)


def test_the_share_that_is_held_out_can_be_chosen(tmp_path):
    build(tmp_path / "a", numbered(40))
    ids = ("data.tokenizer=none", "data.vocab_size=2000")
    usual, more = dataset(tmp_path / "a", *ids), dataset(tmp_path / "a", *ids, "data.held_out_share=0.25")
    assert (usual.heldout_stream.size, more.heldout_stream.size) == (2 * 50, 10 * 50)
    assert set(read_all(usual.heldout_stream)) < set(read_all(more.heldout_stream))
    assert usual.fingerprint != more.fingerprint
    assert dataset(tmp_path / "a", *ids, "data.held_out_share=0.05").fingerprint == usual.fingerprint


@pytest.mark.parametrize("mixture", ["proportional", "uniform"])
def test_the_order_depends_on_seed_and_content_alone(folder, tmp_path, mixture):
    def ids(data: TokenDataset, ranks: int) -> list[int]:
        found = np.empty(16, np.int64)
        for rank in range(ranks):
            loader = Loader(data, global_batch=16, micro_batch=2, rank=rank, ranks=ranks)
            for number, batch in enumerate(loader.step(3)):
                found[loader._slots(number)] = batch.sample_ids_B.numpy()
        return found.tolist()

    data = dataset(folder, f"data.mixture={mixture}")
    first = ids(data, 1)
    assert ids(data, 2) == ids(data, 4) == first
    shutil.copytree(folder, tmp_path / "moved")
    moved = dataset(tmp_path / "moved", f"data.mixture={mixture}")
    assert moved.fingerprint == data.fingerprint and ids(moved, 2) == first
    assert ids(dataset(folder, f"data.mixture={mixture}", "run.seed=1"), 1) != first
    build(tmp_path / "moved" / "zz", numbered(30, 8))                # another domain: other data
    assert dataset(tmp_path / "moved", f"data.mixture={mixture}").fingerprint != data.fingerprint


def damage(prefix: Path, how: str) -> None:
    index, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    content = bytearray(index.read_bytes())
    match how:
        case "no bin":
            tokens.unlink()
        case "no idx":
            index.unlink()
        case "other magic":
            content[:4] = b"NOPE"
        case "version":
            content[9] = 2
        case "short index":
            del content[-20:]
        case "lengths":
            content[34:38] = (10_000).to_bytes(4, "little")
        case "count":
            content[18:26] = (1 << 60).to_bytes(8, "little")
        case "documents":
            content[-8:] = (3).to_bytes(8, "little")
        case "pointers":
            content[34 + 4 * 30 + 8:34 + 4 * 30 + 16] = (1 << 50).to_bytes(8, "little")
        case "short bin":
            tokens.write_bytes(tokens.read_bytes()[:-2])
        case "empty bin":
            tokens.write_bytes(b"")
        case "long bin":
            tokens.write_bytes(tokens.read_bytes() + b"\0\0")
    if index.exists():
        index.write_bytes(content)


@pytest.mark.parametrize("how, number", [
    ("no bin", 70), ("no idx", 70), ("other magic", 71), ("short index", 71), ("lengths", 71), ("count", 71),
    ("documents", 71),
    ("pointers", 71), ("version", 71), ("short bin", 72), ("long bin", 72), ("empty bin", 72),
    ("vocabulary", 73), ("nothing held out", 74),
])
def test_a_bad_dataset_is_named(tmp_path, how, number):
    prefix = tmp_path / "bad"
    build(prefix, numbered(30, 8) if how != "nothing held out" else numbered(3, 19))
    damage(prefix, how)
    with pytest.raises(DataError) as caught:
        dataset(prefix, "data.tokenizer=none", f"data.vocab_size={239 if how == 'vocabulary' else 240}")
    error = caught.value
    assert error.id == f"E-DATA-{number:03d}" and str(prefix) in error.where and error.next
    if number == 73:
        assert "token 239" in error.where and "id 239" in error.why


def test_the_fingerprint_is_that_of_all_versions(tmp_path):
    """By the fingerprint older runs resume with their data, and `eval` finds it."""
    for name, count in (("a", 30), ("b", 3), ("c", 40)):
        build(tmp_path / name, numbered(count), np.int32)
    ids = ("data.tokenizer=none", "data.vocab_size=2000")
    assert (dataset(tmp_path, *ids).fingerprint
            == "6a8596c778278c11babdb988690a41ed2fdb8b9e17d6e58fdd1c3b7d698b4e10")
    assert (dataset(tmp_path / "a", *ids, f"data.held_out={tmp_path / 'c'}").fingerprint
            == "b5b5d87251ea34fdf49029489f856f7e34cc36cec7b11b2d77a4391eb921718e")


def test_an_altered_token_is_other_data(tmp_path):
    build(tmp_path / "a", numbered(30, 8))
    before = dataset(tmp_path / "a", "data.tokenizer=none").fingerprint
    content = bytearray((tmp_path / "a.bin").read_bytes())
    content[100] ^= 1
    (tmp_path / "a.bin").write_bytes(content)
    assert dataset(tmp_path / "a", "data.tokenizer=none").fingerprint != before


def test_a_missing_path_is_named(tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(DataError) as caught:
            dataset(path)
        assert caught.value.id == "E-DATA-070" and str(path) in caught.value.where


@pytest.mark.slow
def test_a_run_trains_evaluates_and_resumes(folder, domains, tmp_path):
    common = [*DEBUG, "data=megatron", f"data.path={folder}", "data.tokenizer=bytes", "run.steps=5",
              "log.wandb=off"]

    def moetrain(*words: str, code: int = 0) -> str:
        done = warm_start.run([sys.executable, "-m", "moetrain", *words], cwd=tmp_path, env=environment(),
                              text=True, timeout=120, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert done.returncode == code, done.stdout
        return done.stdout

    moetrain("train", *common, "run.name=whole")
    assert "Warning" not in moetrain("train", *common, "run.name=broken", "run.stop_at=3")
    moetrain("train", *common, "run.name=broken")
    whole, broken = tmp_path / "runs/whole", tmp_path / "runs/broken"
    assert numbers(broken) == numbers(whole) and len(numbers(whole)) == 5
    assert weights(broken) == weights(whole)
    record = json.loads((broken / "eval.jsonl").read_text().splitlines()[-1])
    assert {f"nats_per_byte/{domain}" for domain in domains} <= record.keys()


def test_a_file_that_is_cut_short_while_it_is_in_use_is_named(tmp_path):
    build(tmp_path / "one", numbered(40), np.int32)
    data = dataset(tmp_path / "one", "data.tokenizer=none", "data.vocab_size=2000")
    data.train_stream.read(0, 10)
    os.truncate(tmp_path / "one.idx", 100)                           # read once, and not mapped into memory
    assert data.train_stream.read(100, 3).tolist() == [100, 101, 102]
    os.truncate(tmp_path / "one.bin", 100)
    with pytest.raises(DataError, match="E-DATA-122") as caught:     # mapped into memory it would be SIGBUS
        data.train_stream.read(100, 10)
    assert caught.value.where == str(tmp_path / "one.bin")
