"""The token that ends a document: from the config, the files or a known name; refused otherwise."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, trainers

from moetrain.data.tokenizers.tokenizer import load_tokenizer
from moetrain.errors import DataError
from tests.support.tokenizers import saved


def tokenizer_of(folder: Path, special: list[str], **beside: object) -> str:
    """A folder with a tokenizer that has these special tokens, and files beside it."""
    made = Tokenizer(models.BPE())
    made.train_from_iterator(["some words here"],
                             trainers.BpeTrainer(special_tokens=special, show_progress=False))
    made.save(str(folder / "tokenizer.json"))
    for name, content in beside.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return str(folder)


@pytest.mark.parametrize("special, beside, end", [
    (["<a>", "<EOT>"], {}, "<EOT>"),
    (["<a>", "</s>", "<b>"], {"tokenizer_config": {"eos_token": "<b>"}}, "<b>"),
    (["<a>", "</s>", "<b>"], {"tokenizer_config": {"eos_token": {"content": "<b>", "lstrip": False}}}, "<b>"),
    (["<a>", "<b>"], {"tokenizer_config": {"eos_token": None},
                      "special_tokens_map": {"eos_token": {"content": "<b>"}}}, "<b>"),
    (["<a>", "<b>"], {"generation_config": {"eos_token_id": [1, 0]}, "config": {"eos_token_id": 0}}, "<b>"),
    (["<a>", "<b>"], {"config": {"eos_token_id": 1}}, "<b>"),
    (["<a>", "<b>", "</s>"], {"config": {"eos_token_id": 9999}}, "</s>"),
    (["<a>", "<\uff5cend\u2581of\u2581sentence\uff5c>"], {}, "<\uff5cend\u2581of\u2581sentence\uff5c>"),
])
def test_the_files_of_the_tokenizer_say_it(tmp_path: Path, special: list[str], beside: dict[str, object],
                                           end: str) -> None:
    folder = tokenizer_of(tmp_path, special, **beside)
    assert load_tokenizer(folder).end_id == special.index(end)
    assert load_tokenizer(folder, end_token="<a>").end_id == 0                # what is typed comes first


def test_nothing_that_says_it_is_refused(tmp_path: Path) -> None:
    folder = tokenizer_of(tmp_path, ["<start>", "<halt>"])
    with pytest.raises(DataError, match="E-DATA-151") as caught:
        load_tokenizer(folder)
    assert ("<halt>" in caught.value.why and "data.end_token=" in caught.value.next
            and "new" in caught.value.next)
    assert load_tokenizer(folder, end_token="<halt>").end_id == 1
    new = load_tokenizer(folder, end_token="new")
    assert new.end_id == new.vocab_size - 1


@pytest.mark.parametrize("beside, typed", [({}, "<hlat>"),
                                           ({"tokenizer_config": {"eos_token": "<hlat>"}}, None)])
def test_a_token_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path, beside: dict[str, object],
                                                                  typed: str | None) -> None:
    with pytest.raises(DataError, match="E-DATA-152") as caught:
        load_tokenizer(tokenizer_of(tmp_path, ["<start>", "<halt>"], **beside), end_token=typed)
    assert "'<hlat>'" in caught.value.why and "data.end_token=<halt>" in caught.value.next


def test_a_token_that_text_is_made_of_ends_no_document(tmp_path: Path) -> None:
    path = saved("byte-level BPE", tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match="E-DATA-155"):
        load_tokenizer(str(path), end_token="a")
