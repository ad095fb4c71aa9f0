"""Token shards: what is written is read, and whatever happens to a file on disk is refused by name."""

import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from moetrain.data.tokens import shards as tokens_module
from moetrain.data.tokens.blocks import TokenBlocks
from moetrain.data.tokens.shards import TokenShard, open_shard
from moetrain.errors import DataError, DiskError, MoETrainError
from tests.support.shards import with_header, write_documents

DOCUMENTS = [np.arange(5), np.zeros(0, np.int64), np.array([256, 7, 7]), np.arange(100)]


def written(path: Path, vocab_size: int = 257) -> Path:
    write_documents(path, DOCUMENTS, document_domains=[0, 0, 1, 1], vocab_size=vocab_size,
                domains=["a", "b"], text_bytes=107)
    return path


def refused(path: Path) -> DataError:
    with pytest.raises(DataError) as caught:
        open_shard(path, verify=True)
    assert str(path) in caught.value.where and caught.value.code == 12
    assert caught.value.what and caught.value.why and caught.value.next
    return caught.value


@pytest.mark.parametrize("vocab_size, dtype", [(257, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_what_is_written_is_read(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    shard = open_shard(written(tmp_path / "s.tokens", vocab_size), verify=True)
    assert isinstance(shard, TokenShard) and isinstance(shard.tokens, TokenBlocks)
    assert shard.tokens.layout.dtype == dtype and shard.documents == 4 and shard.domains == ("a", "b")
    assert shard.tokens.read(0, 108).tolist() == np.concatenate(DOCUMENTS).tolist()
    assert shard.offsets.tolist() == [0, 5, 5, 8, 108] and shard.document_domains.tolist() == [0, 0, 1, 1]


def test_a_shard_without_documents_is_read(tmp_path: Path) -> None:
    write_documents(tmp_path / "s", [], document_domains=[], vocab_size=9, domains=[], text_bytes=0)
    assert len(open_shard(tmp_path / "s", verify=True).tokens) == 0


def test_an_existing_shard_is_not_overwritten(tmp_path: Path) -> None:
    path = written(tmp_path / "s.tokens")
    before = path.read_bytes()
    with pytest.raises(DiskError):
        written(path)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["s.tokens"]


def test_missing_empty_and_foreign_files_are_refused(tmp_path: Path) -> None:
    assert refused(tmp_path / "missing").id == "E-DATA-001"
    assert refused(tmp_path).id == "E-DATA-001"
    (tmp_path / "empty").touch()
    assert refused(tmp_path / "empty").id == "E-DATA-002"
    (tmp_path / "junk").write_bytes(b"\0\1\2 not tokens" * 10)
    assert refused(tmp_path / "junk").id == "E-DATA-003"


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = written(tmp_path / "s.tokens").read_bytes()
    for length in [*range(1, 40), *range(40, len(whole), 23), len(whole) - 1]:
        path = tmp_path / "cut"
        path.write_bytes(whole[:length])
        assert refused(path).id == "E-DATA-006", length
    path.write_bytes(whole + b"\0")
    assert refused(path).id == "E-DATA-006"


def test_every_flipped_bit_is_refused(tmp_path: Path) -> None:
    whole = written(tmp_path / "s.tokens").read_bytes()
    path = tmp_path / "flipped"
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << position % 8]) + whole[position
                                                                                                 + 1:])
        refused(path)


def test_an_altered_block_is_named_by_its_offset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_module, "BLOCK", 32)
    path = written(tmp_path / "s.tokens")
    raw = bytearray(path.read_bytes())
    start = len(raw) - 2 * 108
    raw[start + 2 * 70] ^= 1
    path.write_bytes(raw)
    error = refused(path)
    assert error.id == "E-DATA-007" and f"byte {start + 2 * 64:,}" in error.where and "block 2" in error.why


def test_an_id_outside_the_vocabulary_is_named_by_document(tmp_path: Path) -> None:
    error = refused(with_header(written(tmp_path / "s.tokens"), vocab_size=256))
    assert error.id == "E-DATA-008" and "document 2, token 0" in error.where and "256" in error.why


@pytest.mark.parametrize("changes", [
    {"tokens": -1}, {"tokens": 1 << 60}, {"tokens": "108"}, {"tokens": True}, {"tokens": 107},
    {"documents": 1 << 40},
    {"documents": 3}, {"dtype": "float64"}, {"dtype": None}, {"dtype": []}, {"dtype": {}}, {"domains": "ab"},
    {"domains": ["a"]}, {"domains": [1, 2]}, {"block_crc": []}, {"block_crc": ["x"]}, {"block_crc": None},
    {"index_crc": 0}, {"vocab_size": None},
])
def test_a_hostile_header_is_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    refused(with_header(written(tmp_path / "s.tokens"), **changes))


@pytest.mark.parametrize("header", [b"[" * 100_000, b"{", b"\xff\xfe", b"[]", b"null", b'{"tokens": NaN}'])
def test_a_header_that_is_no_mapping_is_refused(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "s"
    path.write_bytes(struct.pack("<8sIII", b"MOETOKEN", 1, len(header), zlib.crc32(header)) + header)
    assert refused(path).id == "E-DATA-005"


def test_random_damage_never_raises_anything_else(tmp_path: Path) -> None:
    whole = written(tmp_path / "s.tokens").read_bytes()
    chance, path = random.Random(0), tmp_path / "damaged"
    for _ in range(500):
        raw = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(raw))
            raw[at:at + chance.choice([0, 1, 4, 40])] = chance.randbytes(chance.choice([0, 1, 4, 8]))
        path.write_bytes(raw)
        try:
            assert bytes(raw) == whole or open_shard(path, verify=True) is None
        except MoETrainError:
            pass
