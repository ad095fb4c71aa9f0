"""What data.tokenizer leads to: files, folders, and formats that are named instead of read."""

import base64
import json
from pathlib import Path

import pytest

from moetrain.data.tokenizers.source import (
    SENTENCEPIECE,
    SETTING,
    TEKKEN,
    TIKTOKEN,
    VOCABULARY,
    OtherFormat,
    recognize,
)
from moetrain.data.tokenizers.tokenizer import load_tokenizer
from moetrain.errors import DataError
from tests.support.tokenizers import saved

RANKS = b"".join(base64.b64encode(bytes([number])) + b" %d\n" % number for number in range(256))
# The first pieces of a model that sentencepiece trained.
MODEL = (b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\n\x0c\n\x03<s>\x15\x00\x00\x00\x00\x18\x03"
         b"\n\r\n\x04</s>\x15\x00\x00\x00\x00\x18\x03")
TEKKEN_FILE = json.dumps({"config": {"pattern": "."},
                          "vocab": [{"rank": 0, "token_bytes": "AA==", "token_str": None}]}).encode()


@pytest.mark.parametrize("content, format", [
    (MODEL, SENTENCEPIECE), (RANKS, TIKTOKEN), (TEKKEN_FILE, TEKKEN), (b"\xef\xbb\xbf" + TEKKEN_FILE, TEKKEN),
    (b'{"hello": 0, "world": 1}', VOCABULARY), (b"#version: 0.2\na b\n", VOCABULARY),
    (b"[PAD]\n[UNK]\nhello\n", VOCABULARY), (b'{"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}',
                                             SETTING),
    (b'{"version": "1.0", "model": {}}', None), (b"", None), (b"{", None), (b"[]", None), (b"\xff\0\1", None),
    (b"\n\n\n\n\n\n\n\n", None), (b"plain words\nand more\n", None),
])
def test_formats_are_recognised_by_content(content: bytes, format: OtherFormat | None) -> None:
    assert recognize(content) == format


@pytest.mark.parametrize("name, content, words", [
    ("tokenizer.model", MODEL, ("sentencepiece model", "pip install transformers sentencepiece",
                                "from_pretrained")),
    ("mine.model", MODEL, ("sentencepiece model", "mine.model", "converted/tokenizer.model")),
    ("o200k.tiktoken", RANKS, ("tiktoken ranks", "pip install transformers tiktoken",
                               "converted/tokenizer.model")),
    ("tekken.json", TEKKEN_FILE, ("tekken tokenizer", "pip install transformers tiktoken")),
    ("tokenizer_config.json", b'{"eos_token": "</s>"}', ("settings of a tokenizer",)),
])
def test_another_format_is_named_with_the_line_that_converts_it(tmp_path: Path, name: str, content: bytes,
                                                                words: tuple[str, ...]) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_tokenizer(str(tmp_path / name))
    assert caught.value.id == "E-DATA-150" and f"data.tokenizer={tmp_path}/converted" in caught.value.next
    assert all(word in str(caught.value) for word in words), caught.value


def test_the_folder_of_a_checkpoint(tmp_path: Path) -> None:
    path = saved("byte-level BPE", tmp_path / "tokenizer.json")
    (tmp_path / "config.json").write_text("{}")
    assert load_tokenizer(str(tmp_path)).identity == load_tokenizer(str(path)).identity


def test_a_folder_with_another_format_names_that_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(MODEL)
    with pytest.raises(DataError, match="E-DATA-150.*sentencepiece") as caught:
        load_tokenizer(str(tmp_path))
    assert caught.value.where.startswith(str(tmp_path / "tokenizer.model"))


def test_a_byte_order_mark_changes_nothing(tmp_path: Path) -> None:
    path = saved("Unigram", tmp_path / "tokenizer.json")
    (tmp_path / "marked.json").write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    plain, marked = load_tokenizer(str(path)), load_tokenizer(str(tmp_path / "marked.json"))
    assert (plain.identity == marked.identity
            and plain.encode(b"a word").tolist() == marked.encode(b"a word").tolist())


def test_settings_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    path = saved("byte-level BPE", tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": ')
    with pytest.raises(DataError, match="E-DATA-153") as caught:
        load_tokenizer(str(path))
    assert "tokenizer_config.json" in caught.value.where
