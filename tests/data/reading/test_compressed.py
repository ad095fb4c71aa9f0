"""Compressed files: the same dataset as what they hold, in bounded memory, and damage that is named."""

import bz2
import gzip
import json
import lzma
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from backports import zstd

from moetrain.data.corpus.scan import scan
from moetrain.data.corpus.sources import documents
from moetrain.data.preparation.prepare import prepare
from moetrain.data.preparation.prepared_dataset import open_prepared
from moetrain.data.reading import text_blocks as text_module
from moetrain.data.reading.compressed import ByteStream
from moetrain.data.reading.spool import Spool
from moetrain.data.reading.text_blocks import BLOCK, blocks_of, character_start, cut
from moetrain.errors import DataError, DiskError

COMPRESS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstd.compress,
                                                 ".xz": lzma.compress, ".bz2": bz2.compress}


def story(number: int) -> str:
    return f"document {number} says \u00fcber {number * number}\n" * 40


def sources(root: Path, suffix: str = "", compress: Callable[[bytes], bytes] = bytes) -> Path:
    root.mkdir()
    for number in range(30):
        (root / f"{number}.txt{suffix}").write_bytes(compress(story(number).encode()))
    lines = [json.dumps({"text": story(100 + number), **({"domain": "own"} if number % 2 else {})})
             for number in range(30)]
    (root / f"lines.jsonl{suffix}").write_bytes(compress("\n".join(lines).encode()))
    return root


def run(path: Path, out: Path) -> Path:
    return prepare(path=str(path), out=out, tokenizer="bytes")


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_compressed_folder_is_the_dataset_of_what_it_holds(tmp_path: Path, suffix: str) -> None:
    plain = run(sources(tmp_path / "plain"), tmp_path / "out")
    packed = run(sources(tmp_path / "packed", suffix, COMPRESS[suffix]), tmp_path / "out2")
    assert open_prepared(packed, verify=True).domains == ("jsonl", "own", "txt") and packed.name == plain.name
    for path in plain.glob("*.tokens"):
        assert path.read_bytes() == (packed / path.name).read_bytes()
    assert sorted(path.name for path in packed.parent.iterdir()) == [packed.name, "sources.json"]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_content_decides_and_members_follow_each_other(tmp_path: Path, suffix: str) -> None:
    compress, path = COMPRESS[suffix], tmp_path / "a.txt"
    path.write_bytes(compress(b"first\n") + compress(b"") + compress(b"second\n"))
    with ByteStream(path) as stream:
        assert (stream.peek(3) == b"fir" and stream.read(2) == b"fi" and stream.peek(8) == b"rst\nseco"
                and stream.peek(1) == b"r")
        assert stream.read(99) == b"rst\nsecond\n" and stream.read(9) == stream.peek(9) == b""
        assert stream.position == path.stat().st_size
    plain = tmp_path / f"plain.txt{suffix}"
    plain.write_bytes(b"not compressed")
    with ByteStream(plain) as stream:
        assert stream.compression is None and stream.read(99) == b"not compressed"


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("damage", ["cut", "cut at the end", "altered", "trailing"])
def test_damage_is_refused_with_its_place(tmp_path: Path, suffix: str, damage: str) -> None:
    whole = COMPRESS[suffix](b"".join(b"line %d\n" % number for number in range(20_000)))
    middle = len(whole) // 2
    path = tmp_path / f"a b.txt{suffix}"
    path.write_bytes({"cut": whole[:middle], "cut at the end": whole[:-1], "trailing": whole + b"xyz",
                      "altered": whole[:middle] + b"\0" * 40 + whole[middle + 40:]}[damage])
    with pytest.raises(DataError, match="E-DATA-102") as caught:
        run(path, tmp_path / "out")
    assert (f"{path}, byte " in caught.value.where and "-d" in caught.value.next
            and f"'{path}'" in caught.value.next)
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("suffix", COMPRESS)
def test_what_unpacks_to_much_is_read_in_bounded_memory(tmp_path: Path, suffix: str) -> None:
    """24 MB in a few kB: text, and zeros, which are no text and end the reading at once."""
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(COMPRESS[suffix](b"all alike\n" * 100_000) * 24)
    (tmp_path / f"zeros{suffix}").write_bytes(COMPRESS[suffix](bytes(1_000_000)) * 24)
    with Spool(tmp_path) as spool:
        tracemalloc.start()
        try:
            (document,) = documents(scan(path).files, spool=spool)
            assert document.size == 24_000_000 and sum(map(len, document.blocks(spool))) == document.size
            with pytest.raises(DataError, match="E-DATA-031"):
                list(documents(scan(tmp_path / f"zeros{suffix}").files, spool=spool))
            # a window of 8 MiB
            assert tracemalloc.get_traced_memory()[1] < (16 if suffix == ".xz" else 8) << 20
        finally:
            tracemalloc.stop()
        assert spool.size == document.size


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moetrain.data.reading.json_records.LONGEST_RECORD", 5000)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "good"}\n{"text": "' + b"a" * 5000))
    with pytest.raises(DataError, match="E-DATA-103") as caught:
        run(path, tmp_path / "out")
    assert "line 2, byte 17" in caught.value.where


def test_text_for_which_there_is_no_room_is_a_disk_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DiskError) as caught:
        run(sources(tmp_path / "in", ".gz", gzip.compress), tmp_path / "file" / "out")
    assert caught.value.code == 14


def test_blocks_end_behind_lines_or_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "BLOCK", 10)
    for text in ("a\nbb\nccc\ndddd\n\n", "\u5b57" * 50, "x" * 31 + "\n" + "\u00fc" * 9, "", "a", "\n" * 25):
        raw, small = text.encode(), iter(range(1, 9999))
        assert b"".join(cut(raw)) == raw and all(0 < len(block) <= 10 for block in cut(raw))
        assert "".join(block.decode() for block in cut(raw)) == text  # no character is cut
        place = 0

        def read(size: int) -> bytes:  # a stream that gives little at once
            nonlocal place
            start, place = place, min(place + min(size, next(small) % 3 + 1), len(raw))
            return raw[start:place]

        assert list(blocks_of(read)) == list(cut(raw))
    assert list(cut(b"ab\ncd\nefgh\nij")) == [b"ab\ncd\n", b"efgh\nij"] and BLOCK == 1 << 20


def test_the_start_of_a_character() -> None:
    raw = "a\u00fc\u5b57\U0001f600".encode()
    assert ([character_start(raw, position) for position in range(len(raw) + 1)]
            == [0, 1, 1, 3, 3, 3, 6, 6, 6, 6, 10])
    assert character_start(b"\x80" * 9, 6) == 6  # none near: as it is
