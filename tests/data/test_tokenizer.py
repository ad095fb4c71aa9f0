"""Tokenizers: bytes, and a tokenizer.json made on the spot."""

from pathlib import Path

import pytest

from moetrain.data.tokenizer import load_tokenizer
from moetrain.errors import DataError

TEXT = "Ein Satz, ein Wort: \u00e4\u00f6\u00fc \u4f60\u597d.\n" * 50


def trained(path: Path, special_tokens: list[str]) -> Path:
    """A byte-level BPE tokenizer of 300 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator([TEXT], trainers.BpeTrainer(
        vocab_size=300, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False))
    library.save(str(path))
    return path


def test_bytes_come_back() -> None:
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(TEXT.encode())
    assert tokenizer.vocab_size == 257 and tokenizer.end_id == 256 and ids.max() < 256
    assert tokenizer.decode([*ids, tokenizer.end_id]) == TEXT
    assert tokenizer.decode([255]) == "\ufffd"


@pytest.mark.parametrize("marks, added", [(["</s>"], 0), (["[SEP]", "<|endoftext|>"], 0), ([], 1)])
def test_a_file_gives_text_back_and_has_an_end(tmp_path: Path, marks: list[str], added: int) -> None:
    tokenizer = load_tokenizer(str(trained(tmp_path / "tokenizer.json", marks)))
    ids = tokenizer.encode(TEXT.encode())
    assert len(ids) < len(TEXT.encode()) and ids.max() < tokenizer.vocab_size
    assert tokenizer.decode([*ids, tokenizer.end_id]) == TEXT
    assert tokenizer.end_id == (tokenizer.vocab_size - 1 if added else len(marks) - 1)
    assert len(tokenizer.encode(b"")) == 0


def test_a_missing_or_bad_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('{"model": 3}')
    (tmp_path / "binary.json").write_bytes(b"\xff\0\1")
    for name, number in (("missing.json", "020"), ("bad.json", "021"), ("binary.json", "021"), (".", "020")):
        with pytest.raises(DataError, match=f"E-DATA-{number}") as caught:
            load_tokenizer(str(tmp_path / name))
        assert str(tmp_path / name) in caught.value.where
