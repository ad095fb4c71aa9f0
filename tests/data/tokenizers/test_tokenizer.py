"""Tokenizers: bytes, and a tokenizer.json made on the spot."""

from pathlib import Path

import numpy as np
import pytest

from moetrain.data.tokenizers.tokenizer import load_tokenizer
from moetrain.errors import DataError
from tests.support.tokenizers import byte_level_bpe, saved

TEXT = "Ein Satz, ein Wort: \u00e4\u00f6\u00fc \u4f60\u597d.\n" * 50


def test_bytes_come_back() -> None:
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(TEXT.encode())
    assert tokenizer.vocab_size == 257 and tokenizer.end_id == 256 and ids.max() < 256
    assert tokenizer.decode([*ids, tokenizer.end_id]) == TEXT
    assert tokenizer.decode([255]) == "\ufffd"


def test_bytes_of_documents_end_with_256() -> None:
    found = list(load_tokenizer("bytes").encode_documents([[b"ab", b"c"], [], [b"d"]], sizes=True))
    assert np.concatenate([encoded.ids for encoded in found]).tolist() == [97, 98, 99, 256, 256, 100, 256]
    assert np.concatenate([encoded.sizes for encoded in found]).tolist() == [1, 1, 1, 0, 0, 1, 0]
    assert [encoded.last for encoded in found] == [False, False, True, True, False, True]


def test_a_file_gives_text_back(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(saved("byte-level BPE", tmp_path / "tokenizer.json")))
    ids = tokenizer.encode(TEXT.encode())
    assert len(ids) < len(TEXT.encode()) and ids.max() < tokenizer.vocab_size
    assert tokenizer.decode([*ids, tokenizer.end_id]) == TEXT
    assert len(tokenizer.encode(b"")) == 0


def test_a_new_end_token_is_one_more_id(tmp_path: Path) -> None:
    path = saved("byte-level BPE", tmp_path / "tokenizer.json")
    given, new = load_tokenizer(str(path)), load_tokenizer(str(path), end_token="new")
    assert new.end_id == new.vocab_size - 1 == given.vocab_size and given.end_id < given.vocab_size
    assert new.identity != given.identity and new.decode([new.end_id]) == ""


def test_what_changes_the_tokens_changes_the_identity(tmp_path: Path) -> None:
    path = str(saved("byte-level BPE", tmp_path / "tokenizer.json"))
    made = byte_level_bpe(300)
    made.save(str(tmp_path / "other.json"))
    found = [load_tokenizer(path), load_tokenizer(str(tmp_path / "other.json")),
             load_tokenizer(path, end_token="</s>"), load_tokenizer(path, parse_special=True)]
    assert len({tokenizer.identity for tokenizer in found}) == 4
    assert load_tokenizer(path).identity == found[0].identity


@pytest.mark.parametrize("more", [{"end_token": "</s>"}, {"parse_special": True}])
def test_bytes_have_no_special_tokens(more: dict[str, object]) -> None:
    with pytest.raises(DataError, match="E-DATA-156") as caught:
        load_tokenizer("bytes", **more)
    assert next(iter(more)) in caught.value.next


def test_a_missing_or_bad_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('{"model": 3}')
    (tmp_path / "binary.json").write_bytes(b"\xff\0\1")
    for name, number in (("missing.json", "020"), ("bad.json", "021"), ("binary.json", "021"), (".", "020")):
        with pytest.raises(DataError, match=f"E-DATA-{number}") as caught:
            load_tokenizer(str(tmp_path / name))
        assert str(tmp_path / name) in caught.value.where
