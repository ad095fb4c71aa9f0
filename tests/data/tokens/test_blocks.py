"""Tokens are compared with checksums at their first read; a file that changes while in use is named."""

import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest

from moetrain.data.preparation.prepare import prepare
from moetrain.data.preparation.prepared_dataset import Prepared, open_prepared
from moetrain.data.tokenizers.tokenizer import load_tokenizer
from moetrain.data.tokens import blocks as token_blocks, shards as tokens_module
from moetrain.data.tokens.shards import TokenShard, open_shard
from moetrain.errors import DataError
from tests.support.odd_files import ODD, make_odd
from tests.support.shards import with_header, write_documents

BLOCK, TOKENS = 64, 1000


@pytest.fixture
def shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TokenShard:
    monkeypatch.setattr(tokens_module, "BLOCK", BLOCK)
    write_documents(tmp_path / "s.tokens", [np.arange(TOKENS) % 257], document_domains=[0], vocab_size=257,
                    domains=["a"],
                text_bytes=TOKENS)
    return open_shard(tmp_path / "s.tokens", verify=False)


def alter(shard: TokenShard, token: int, value: int = 1) -> None:
    with open(shard.path, "r+b") as file:
        file.seek(shard.tokens.layout.start + 2 * token)
        file.write(value.to_bytes(2, "little"))


def refused(shard: TokenShard, begin: int, end: int) -> DataError:
    with pytest.raises(DataError) as caught:
        shard.tokens.read(begin, end)
    assert caught.value.code == 12 and str(shard.path) in caught.value.where
    return caught.value


def test_a_block_is_checked_when_it_is_first_read_and_only_then(shard: TokenShard,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    checked, crc32 = [], zlib.crc32
    monkeypatch.setattr(zlib, "crc32", lambda ids: checked.append(len(ids)) or crc32(ids))
    assert shard.tokens.read(60, 70).tolist() == list(range(60, 70)) and checked == [BLOCK, BLOCK]
    assert shard.tokens.read(0, 128).tolist() == list(range(128)) and len(checked) == 2
    assert shard.tokens.read(990, 1000).tolist() == [i % 257 for i in range(990, 1000)]
    assert checked == [BLOCK, BLOCK, TOKENS % BLOCK]


def test_an_altered_block_is_refused_when_it_is_read(shard: TokenShard) -> None:
    alter(shard, 200)
    assert shard.tokens.read(0, 192).tolist() == list(range(192))
    error = refused(shard, 190, 194)
    assert error.id == "E-DATA-007" and "block 3" in error.why


def test_a_block_altered_after_it_was_read_is_refused_too(shard: TokenShard,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    shard.tokens.verify()
    alter(shard, 5)
    os.utime(shard.path, ns=(0, 1))  # two writes may fall into one tick of the file system's clock
    monkeypatch.setattr(token_blocks, "LOOK_S", 0.0)
    assert refused(shard, 0, 1).id == "E-DATA-007"


def test_an_id_outside_the_vocabulary_is_refused_when_it_is_read(tmp_path: Path) -> None:
    write_documents(tmp_path / "s.tokens", [np.arange(5), np.array([3, 256])], document_domains=[0, 0],
                    vocab_size=257,
                domains=["a"], text_bytes=7)
    shard = open_shard(with_header(tmp_path / "s.tokens", vocab_size=256), verify=False)
    error = refused(shard, 0, 1)
    assert error.id == "E-DATA-008" and "document 1, token 1" in error.where and "256" in error.why


@pytest.mark.parametrize("left", [0, 100, -2])
def test_a_file_cut_short_while_it_is_in_use_is_named(shard: TokenShard, left: int) -> None:
    """Mapped into memory it would be SIGBUS, and the end of the process."""
    shard.tokens.verify()
    size = shard.path.stat().st_size
    os.truncate(shard.path, left if left >= 0 else size + left)
    error = refused(shard, 900, 1000)
    assert error.id == "E-DATA-006" and f"instead of {size:,}" in error.why


def test_a_file_that_another_took_the_place_of_is_not_mixed_with_it(shard: TokenShard) -> None:
    assert shard.tokens.read(0, 2).tolist() == [0, 1]
    os.replace(write_other(shard.path.with_name("other"), BLOCK), shard.path)
    assert shard.tokens.read(0, 2).tolist() == [0, 1]            # the one that is open
    token_blocks._opened.cache_clear()
    error = refused(shard, 0, 2)
    assert error.id == "E-DATA-001" and "another file has taken its place" in error.why


def write_other(path: Path, tokens: int) -> Path:
    write_documents(path, [np.full(tokens, 7)], document_domains=[0], vocab_size=257, domains=["a"],
                    text_bytes=tokens)
    return path


def test_many_shards_need_few_descriptors(tmp_path: Path) -> None:
    shards = [open_shard(write_other(tmp_path / f"{number}.tokens", number + 1), verify=False)
              for number in range(100)]
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        assert [len(shard.tokens.read(0, len(shard.tokens))) for shard in shards] == list(range(1, 101))
    assert len(os.listdir("/proc/self/fd")) <= before + token_blocks.MOST_OPEN


# --- what lies in a folder of prepared tokens, and is not what it should be


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for number in range(3):
        (folder / f"{number}.txt").write_text(f"{number} words " * 300)
    return folder


def prepared(text: Path, out: Path) -> Path:
    return prepare(path=str(text), out=out, tokenizer="bytes", domain_cap=None)


@pytest.mark.parametrize("kind", [*ODD, "link"])
@pytest.mark.parametrize("name", ["dataset.json", "train-00000.tokens"])
def test_what_is_no_file_of_its_own_is_refused_by_name(text: Path, tmp_path: Path, name: str,
                                                       kind: str) -> None:
    path = prepared(text, tmp_path / "data") / name
    if kind == "link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
        what = "a link"
    else:
        what = make_odd(path, kind)
    with pytest.raises(DataError) as caught:
        open_prepared(path.parent, verify=False)
    linked = kind in ("circle", "nowhere", "device", "linked fifo")
    assert (str(path) in caught.value.where
            and f"it is {'a link' if linked else what}, not a file" in caught.value.why)


@pytest.mark.parametrize("kind", ODD)
def test_what_sources_json_is_does_not_matter(text: Path, tmp_path: Path, kind: str) -> None:
    folder = prepared(text, tmp_path / "data")
    make_odd(tmp_path / "data" / "sources.json", kind)
    assert prepared(text, tmp_path / "data") == folder


def test_a_lost_description_is_told_by_its_name(text: Path, tmp_path: Path) -> None:
    folder = prepared(text, tmp_path / "data")
    (folder / "dataset.json").unlink()
    for attempt in (lambda: prepared(text, tmp_path / "data"), lambda: open_prepared(folder, verify=False)):
        with pytest.raises(DataError) as caught:
            attempt()
        assert caught.value.id == "E-DATA-121" and caught.value.where == str(folder)
    (tmp_path / "data" / "sources.json").unlink()  # known only once the text has been read again
    with pytest.raises(DataError, match="E-DATA-121"):
        prepared(text, tmp_path / "data")
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()                                               # what is advised
    assert isinstance(open_prepared(prepared(text, tmp_path / "data"), verify=True), Prepared)


# --- tokenizers

MODEL = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
         "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": {"a": 0, "b": 1},
         "merges": []}


def tokenizer_file(path: Path, **changes: object) -> Path:
    content = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
               "pre_tokenizer": None, "post_processor": None, "decoder": None, "model": MODEL} | changes
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("changes", [
    {"model": MODEL | {"continuing_subword_prefix": "#" * 10, "merges": ["a b"],
                       "vocab": {"a": 0, "b": 1, "ab": 2}}},
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, {"model": {"type": "BPE"}},
    {"model": None},
])
def test_a_tokenizer_whose_library_panics_is_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    with pytest.raises(DataError) as caught:
        load_tokenizer(str(tokenizer_file(tmp_path / "tokenizer.json", **changes)), end_token="new")
    assert caught.value.id == "E-DATA-021" and caught.value.why


@pytest.mark.parametrize("changes", [
    {"pre_tokenizer": {"type": "FixedLength", "length": 0}}, {"model": MODEL | {"unk_token": "<missing>"}},
])
def test_a_tokenizer_that_fails_on_a_text_is_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    encoder = load_tokenizer(str(tokenizer_file(tmp_path / "tokenizer.json", **changes)), end_token="new")
    with pytest.raises(DataError) as caught:
        encoder.encode(b"hello")
    assert caught.value.id == "E-DATA-120" and str(tmp_path) in caught.value.where


@pytest.mark.parametrize("kind", ODD)
def test_a_tokenizer_that_is_no_file_is_named(tmp_path: Path, kind: str) -> None:
    what = make_odd(tmp_path / "tokenizer.json", kind)
    with pytest.raises(DataError) as caught:
        load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert caught.value.id == "E-DATA-020" and what in caught.value.why
