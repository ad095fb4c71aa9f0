"""Exported tokenizers: stock AutoTokenizer gives the ids that the run was trained on, for every text."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from moetrain.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from moetrain.interop.huggingface.tokenizer_files import END, byte_characters, tokenizer_files

transformers = pytest.importorskip("transformers")

MARKS = (END, "</s>", "<s>", "[END]", "the ", "\r\n", "  ", "\u0120", "\u00e9", "\U0001f600", "\u0301")
TEXTS = st.lists(st.text() | st.sampled_from(MARKS), max_size=6).map("".join)


def loaded(files: dict[str, bytes], folder: Path, model_type: str = "mixtral") -> Any:
    """Write a folder, and load it as a stranger does."""
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return transformers.AutoTokenizer.from_pretrained(folder)


def trained(folder: Path, special: list[str], processing: bool = False) -> Path:
    """A small BPE of the tokenizers library; `processing` puts its first special token before every text."""
    from tokenizers import Tokenizer as Library, decoders, models, pre_tokenizers, processors, trainers

    library = Library(models.BPE())
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    library.train_from_iterator(["the cat on the mat </s> the hat"] * 4, trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if processing:
        library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    library.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def same_ids(ours: Tokenizer, theirs: Any) -> None:
    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(TEXTS)
    def for_every_text(text: str) -> None:
        ids = ours.encode(text.encode()).tolist()
        assert theirs(text).input_ids == ids
        assert theirs.decode([*ids, ours.end_id], skip_special_tokens=True) == ours.decode(ids)

    for_every_text()
    assert theirs.eos_token_id == ours.end_id and len(theirs) == ours.vocab_size


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_bytes_are_the_same_for_every_text(tmp_path: Path, model_type: str) -> None:
    ours = load_tokenizer("bytes")
    theirs = loaded(tokenizer_files(ours), tmp_path / "out", model_type)
    same_ids(ours, theirs)
    assert [theirs.convert_ids_to_tokens(byte) for byte in range(256)] == byte_characters()


@pytest.mark.parametrize("end_token, parse_special", [("</s>", False), ("new", False), ("</s>", True)])
def test_a_file_is_the_same_for_every_text(tmp_path: Path, end_token: str, parse_special: bool) -> None:
    path = trained(tmp_path, ["<s>", "</s>", END], processing=True)
    ours = load_tokenizer(str(path), end_token=end_token, parse_special=parse_special)
    same_ids(ours, loaded(tokenizer_files(ours), tmp_path / "out"))


def test_the_files_of_the_imported_folder_are_written_back(tmp_path: Path) -> None:
    origin = tmp_path / "origin"
    origin.mkdir()
    path = trained(origin, ["</s>"])
    (origin / "tokenizer_config.json").write_text('{"eos_token": "</s>", "chat_template": "{{ messages }}"}')
    kept = tokenizer_files(load_tokenizer(str(path)), origin)
    assert kept == {file.name: file.read_bytes() for file in origin.iterdir()}
    other = tokenizer_files(load_tokenizer("bytes"), origin)     # trained on with another tokenizer
    assert other["tokenizer.json"] != path.read_bytes()
    assert b"chat_template" not in other["tokenizer_config.json"]
    assert tokenizer_files(None, origin) == kept and tokenizer_files(None) == {}
