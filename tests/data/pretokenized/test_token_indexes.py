"""Token files are read whole once: an index is used while nothing has changed, and never otherwise."""

import logging
import os
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

from moetrain.config.compose import compose
from moetrain.config.schema import Config
from moetrain.data.corpus.scan import scan
from moetrain.data.loader import TokenDataset, build_dataset
from moetrain.data.pretokenized.token_indexes import TokenIndexes, Use
from moetrain.data.tokens.index_file import read_index, write_index
from moetrain.data.tokens.shards import BLOCK
from moetrain.errors import DataError, DiskError
from tests.support import needs
from tests.support.indexed_data import build
from tests.support.opened_files import opened_files
from tests.support.token_writers import WRITERS, nanogpt

VOCAB = 50257


def ids(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 300, count)


def memmap(folder: Path) -> Path:
    """Files of several formats, one of them of three blocks."""
    nanogpt(folder / "web_train_0.bin", ids(0, 2 * BLOCK + 5))
    for number, (write, suffix, _) in enumerate(WRITERS.values()):
        write(folder / f"web_train_{number + 1}{suffix}", ids(number, 2000))
    nanogpt(folder / "web_val.bin", ids(9, 500))
    return folder


def megatron(folder: Path) -> Path:
    needs.module("megatron.core", extra="megatron")
    for name in ("a", "b"):
        build(folder / name, [[np.append(ids(number, 400), 7)] for number in range(30)], np.int32)
    return folder


KINDS = {"memmap": memmap, "megatron": megatron}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    (tmp_path / "in").mkdir()
    KINDS[request.param](tmp_path / "in")
    return request.param


def config(kind: str, folder: Path, *overrides: str) -> Config:
    return compose([f"data={kind}", f"data.path={folder / 'in'}", f"data.vocab_size={VOCAB}",
                    "train.seq_len=8", "data.end_token=7", *overrides])


def dataset(kind: str, folder: Path, *overrides: str, use: Use = "keep", progress=None,
            out: str = "out") -> TokenDataset:
    return build_dataset(config(kind, folder, *overrides), folder / "run", None,
                         indexes=TokenIndexes(folder / out, use=use, progress=progress))


def tokens(data: TokenDataset) -> list[int]:
    return [id for stream in (data.train_stream, data.heldout_stream)
            for id in stream.read(0, stream.size).tolist()]


def test_the_second_start_opens_no_token_file_and_gives_the_same_data(kind: str, tmp_path: Path) -> None:
    with opened_files(tmp_path / "in") as first:
        before = dataset(kind, tmp_path)
    assert first == sorted(path.name for path in (tmp_path / "in").iterdir())
    with opened_files(tmp_path / "in") as second:
        again = dataset(kind, tmp_path)
    assert second == []
    assert (again.fingerprint == before.fingerprint
            == build_dataset(config(kind, tmp_path), tmp_path, None).fingerprint)
    assert ((again.train_stream.document_starts == before.train_stream.document_starts).all()
            and tokens(again) == tokens(before))


def test_nothing_is_kept_where_nobody_asks_for_it(kind: str, tmp_path: Path) -> None:
    dataset(kind, tmp_path, use="look")
    build_dataset(config(kind, tmp_path), tmp_path / "run", None)
    assert os.listdir(tmp_path) == ["in"]


CHANGES = [("memmap", "time of change"), ("memmap", "entry"), ("memmap", "size"),
           ("megatron", "time of change"), ("megatron", "entry"), ("megatron", "index of Megatron")]


@pytest.mark.parametrize("kind, what", CHANGES, indirect=["kind"])
def test_a_file_that_has_changed_is_read_again_and_it_alone(kind: str, tmp_path: Path, what: str) -> None:
    before = dataset(kind, tmp_path)
    name = {"memmap": "web_train_2.bin", "megatron": "a.bin"}[kind]
    path = tmp_path / "in" / name
    found = path.stat()
    if what == "index of Megatron":
        name = "a.idx"
        os.utime(tmp_path / "in" / name, ns=(0, 5))
    elif what == "size":
        with open(tmp_path / "in/web_train_0.bin", "ab") as file:
            file.write(b"\5\0")
        name = "web_train_0.bin"
    else:
        content = bytearray(path.read_bytes())
        content[-4] ^= 1
        time.sleep(0.02)  # two writes may fall into one tick of the file system's clock
        path.write_bytes(content)
        if what == "entry":  # as rsync --times leaves it: the time of the content is the old one
            os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
            assert path.stat().st_mtime_ns == found.st_mtime_ns and path.stat().st_size == found.st_size
    with opened_files(tmp_path / "in") as opened:
        after = dataset(kind, tmp_path)
    assert opened == {"memmap": [name], "megatron": ["a.bin", "a.idx"]}[kind]
    assert (after.fingerprint == before.fingerprint) == (what == "index of Megatron")
    with opened_files(tmp_path / "in") as opened:
        assert dataset(kind, tmp_path).fingerprint == after.fingerprint
    # it was replaced
    assert opened == [] and len(os.listdir(tmp_path / "out")) == {"memmap": 9, "megatron": 2}[kind]


def test_other_settings_read_again(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    nanogpt(tmp_path / "in/a.bin", ids(0, 4000))
    first = dataset("memmap", tmp_path)
    for overrides in (["data.end_token=9"], ["data.end_token=null"], ["data.vocab_size=301"],
                      ["data.dtype=uint16"]):
        with opened_files(tmp_path / "in") as opened:
            other = dataset("memmap", tmp_path, *overrides)
        assert opened == ["a.bin"]
        starts, others = (data.train_stream.document_starts.tolist() for data in (first, other))
        assert starts != others or "end" not in overrides[0]
    # the index of a larger vocabulary says nothing about this one
    with pytest.raises(DataError, match="E-DATA-073"):
        dataset("memmap", tmp_path, "data.vocab_size=299", "data.dtype=uint16")


@pytest.mark.parametrize("how", ["cut", "turned", "folder", "link"])
def test_a_damaged_index_is_made_again(kind: str, tmp_path: Path, how: str,
                                       caplog: pytest.LogCaptureFixture) -> None:
    before = dataset(kind, tmp_path)
    victim = sorted((tmp_path / "out").iterdir())[0]
    content = victim.read_bytes()
    match how:
        case "cut":
            os.truncate(victim, 50)
        case "turned":
            victim.write_bytes(content[:-3] + b"\1" + content[-2:])
        case "folder":
            victim.unlink()
            victim.mkdir()
        case "link":
            victim.rename(tmp_path / "elsewhere")
            victim.symlink_to(tmp_path / "elsewhere")
    with opened_files(tmp_path / "in") as opened:
        assert dataset(kind, tmp_path).fingerprint == before.fingerprint
    assert (len(opened) == {"memmap": 1, "megatron": 2}[kind] and "is of no use" in caplog.text
            and "is read again" in caplog.text)
    assert how == "folder" and "cannot be kept" in caplog.text or victim.read_bytes() == content


def test_an_index_of_another_file_is_not_believed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        nanogpt(tmp_path / f"in/{name}.bin", ids(ord(name), 3000))
    before = dataset("memmap", tmp_path)
    a, b = (tmp_path / "out").iterdir()
    # of one size, and written at one time
    write_index(a, read_index(b)._replace(stamps=read_index(a).stamps))
    assert dataset("memmap", tmp_path).fingerprint == before.fingerprint


def test_a_block_is_compared_with_its_checksum_though_no_time_has_changed(tmp_path: Path) -> None:
    """A bit that the disk has turned is in no time of change."""
    (tmp_path / "in").mkdir()
    nanogpt(tmp_path / "in/a.bin", ids(0, 2 * BLOCK))
    dataset("memmap", tmp_path)
    (name,) = os.listdir(tmp_path / "out")
    index = (tmp_path / "out" / name).read_bytes()
    kept = read_index(tmp_path / "out" / name)
    content = bytearray((tmp_path / "in/a.bin").read_bytes())
    content[2 * BLOCK + 100] ^= 1
    (tmp_path / "in/a.bin").write_bytes(content)
    found = (tmp_path / "in/a.bin").stat()
    old, new = (repr(times)[1:-1].encode()
                for times in (kept.stamps[0], [found.st_size, found.st_mtime_ns, found.st_ctime_ns]))
    assert len(old) == len(new) and old in index
    magic, version, length, _ = struct.unpack_from("<8sIII", index)
    header = index[20:20 + length].replace(old, new)
    prefix = struct.pack("<8sIII", magic, version, length, zlib.crc32(header))
    (tmp_path / "out" / name).write_bytes(prefix + header + index[20 + length:])
    with opened_files(tmp_path / "in") as opened:
        data = dataset("memmap", tmp_path)
    assert opened == [] and data.train_stream.read(100, 9).tolist() == ids(0, 109)[100:].tolist()
    with pytest.raises(DataError, match="E-DATA-122"):
        data.train_stream.read(BLOCK + 5, 9)


def test_progress_is_of_all_bytes_that_have_to_be_read(kind: str, tmp_path: Path) -> None:
    said: list[tuple[str, int, int]] = []
    dataset(kind, tmp_path, progress=lambda *words: said.append(words))
    total = sum(path.stat().st_size for path in (tmp_path / "in").iterdir() if path.suffix != ".idx")
    done = [row[1] for row in said]
    assert {(row[0], row[2]) for row in said} == {("reading tokens", total)}
    # one of three blocks
    assert done == sorted(done) and done[-1] == total and len(done) == {"memmap": 11, "megatron": 2}[kind]
    said.clear()
    dataset(kind, tmp_path, progress=lambda *words: said.append(words))
    assert said == []
    next(iter(sorted((tmp_path / "out").iterdir()))).unlink()
    dataset(kind, tmp_path, progress=lambda *words: said.append(words))
    assert said[-1][1] == said[-1][2] < total


def test_files_before_a_bad_one_are_not_read_twice(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(4):
        nanogpt(tmp_path / f"in/a_{number}.bin", ids(number, 3000))
    bad = ids(2, 3000)
    bad[77] = 60_000
    nanogpt(tmp_path / "in/a_2.bin", bad)
    with pytest.raises(DataError, match="E-DATA-073"):
        dataset("memmap", tmp_path, "data.dtype=uint16")
    nanogpt(tmp_path / "in/a_2.bin", ids(2, 3000))
    with opened_files(tmp_path / "in") as opened:
        dataset("memmap", tmp_path, "data.dtype=uint16")
    assert opened == ["a_2.bin", "a_3.bin"]


def test_a_folder_that_cannot_be_written_matters_to_other_ranks_alone(
        kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "out").write_text("a file")
    with caplog.at_level(logging.WARNING):
        alone = dataset(kind, tmp_path)
    assert "cannot be kept" in caplog.text and alone.train_stream.size
    with pytest.raises(DiskError, match="E-DISK-010") as caught:
        dataset(kind, tmp_path, use="share")
    assert "data.cache=" in caught.value.next


def test_another_rank_reads_nothing_and_takes_copies_with_other_times(kind: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="E-DATA-167") as caught:
        dataset(kind, tmp_path, use="take")
    assert "data.cache=" in caught.value.next
    first = dataset(kind, tmp_path, use="share")
    for path in (tmp_path / "in").iterdir():
        os.utime(path, ns=(0, 12345))                        # a copy on the disk of a node
    with opened_files(tmp_path / "in") as opened:
        other = dataset(kind, tmp_path, use="take")
    assert opened == [] and other.fingerprint == first.fingerprint and tokens(other) == tokens(first)
    shorter = next(path for path in sorted((tmp_path / "in").iterdir()) if path.suffix == ".bin")
    os.truncate(shorter, shorter.stat().st_size - 4)
    with pytest.raises(DataError, match="E-DATA-167"):
        dataset(kind, tmp_path, use="take")


def test_indexes_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    nanogpt(tmp_path / "in/a.bin", ids(0, 3000))
    dataset("memmap", tmp_path, out=".")
    (tmp_path / "a.txt").write_text("words")
    (tmp_path / f"{'0' * 16}.index").write_text("words")     # of the same name, and not ours
    found = scan(tmp_path)
    (name,) = [path.name for path in tmp_path.glob("*.index") if path.name[0] != "0"
               or path.stat().st_size > 9]
    assert {entry.name: entry.reason for entry in found.ledger.left_out} == {name: "own output"}
    assert {file.entry.name for file in found.files} >= {"a.txt", f"{'0' * 16}.index"}
