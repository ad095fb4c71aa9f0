"""An index on disk: what was written comes back; whatever else lies there is refused, and never believed."""

import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies

from moetrain.data.tokens.index import Ending, TokenIndex
from moetrain.data.tokens.index_file import StoredIndex, read_index, write_index
from moetrain.data.tokens.shards import BLOCK

STARTS = np.array([0, 5, 5, BLOCK, BLOCK + 9])
KEPT = StoredIndex([BLOCK, "/a/b\udce9.bin", 50257, "memmap", None], [[100, 2, 3]],
            TokenIndex("nanoGPT", 0, np.dtype("<u2"), [1, (1 << 32) - 1], STARTS, Ending(7, 2 / 3, 0)))


@pytest.fixture
def written(tmp_path: Path) -> Path:
    write_index(tmp_path / "a.index", KEPT)
    return tmp_path / "a.index"


def same(first: StoredIndex, second: StoredIndex) -> bool:
    return first[:2] == second[:2] and all(np.array_equal(a, b) for a, b in zip(first.index, second.index))


def test_what_was_written_comes_back(written: Path, tmp_path: Path) -> None:
    found = read_index(written)
    assert same(found, KEPT) and found.index.starts.dtype == np.int64
    assert (found.index.tokens, found.index.documents) == (BLOCK + 9, 4)
    assert zlib.crc32(found.index.starts) == zlib.crc32(STARTS)  # of which the fingerprint is made
    other = KEPT._replace(index=KEPT.index._replace(dtype=np.dtype(">i8"), ending=None))
    write_index(written, other)                                              # it is replaced
    assert same(read_index(written), other) and os.listdir(tmp_path) == ["a.index"]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(place=strategies.floats(0, 1, exclude_max=True), bit=strategies.integers(0, 7))
def test_no_bit_can_be_turned(tmp_path_factory: pytest.TempPathFactory, place: float, bit: int) -> None:
    path = tmp_path_factory.getbasetemp() / "turned.index"
    write_index(path, KEPT)
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    path.write_bytes(content)
    with pytest.raises(ValueError):
        read_index(path)


@pytest.mark.parametrize("size", [0, 5, 20, 100, -1, -8])
def test_none_that_is_cut_off_is_read(written: Path, size: int) -> None:
    os.truncate(written, size if size >= 0 else written.stat().st_size + size)
    with pytest.raises(ValueError):
        read_index(written)


def test_a_link_is_not_followed(written: Path, tmp_path: Path) -> None:
    (tmp_path / "b.index").symlink_to(written)
    with pytest.raises(OSError):
        read_index(tmp_path / "b.index")


HOSTILE = {"documents": [1 << 60, -1, "4", None, 3], "blocks": [1 << 60, 3, None],
           "dtype": ["<f4", "O", None, ["<u2"]],
           "key": ["x", None], "stamps": [[1], [[1, 2]], {}, [["a", 2, 3]]],
           "ending": [[1, 2, 3], [1], "abc", 5], "start": [-1, 0.5], "format": [None]}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in HOSTILE.items()
                                         for value in values])
def test_a_header_with_its_checksum_is_not_believed_either(written: Path, name: str, value: object) -> None:
    content = written.read_bytes()
    magic, version, length, _ = struct.unpack_from("<8sIII", content)
    header = json.loads(content[20:20 + length])
    assert name in header
    raw = json.dumps(header | {name: value}).encode()
    written.write_bytes(struct.pack("<8sIII", magic, version, len(raw), zlib.crc32(raw)) + raw
                        + content[20 + length:])
    with pytest.raises(ValueError):
        read_index(written)
