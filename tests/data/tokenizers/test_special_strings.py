"""Special strings inside a text are text, with tokenizers of each kind."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from moetrain.data.tokenizers.tokenizer import load_tokenizer
from tests.support.tokenizers import KINDS, SPECIAL, saved

TEXT = "GPT-2 ends a document with <|endoftext|> and goes on. </s> <unk> </s>x"


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_leads_to_a_special_token(tmp_path: Path, kind: str) -> None:
    path = saved(kind, tmp_path / "tokenizer.json")
    library, tokenizer = Tokenizer.from_file(str(path)), load_tokenizer(str(path))
    parsing = load_tokenizer(str(path), parse_special=True)
    ends = [library.token_to_id(token) for token in SPECIAL[1:]]
    found, parsed = tokenizer.encode(TEXT.encode()), parsing.encode(TEXT.encode())
    assert not np.isin(found, ends).any()
    assert [int((parsed == id).sum()) for id in ends] == [2, 1]  # what the text has of </s> and <|endoftext|>
    assert parsing.count_special(parsed) >= 3
    assert parsed.tolist() == library.encode(TEXT, add_special_tokens=False).ids
    if "BPE" in kind:
        assert tokenizer.decode(found.tolist()) == TEXT
    plain = "some words (see) router 2026"
    assert tokenizer.encode(plain.encode()).tolist() == library.encode(plain, add_special_tokens=False).ids


def test_added_tokens_that_are_not_special_stay(tmp_path: Path) -> None:
    path = saved("byte-level BPE", tmp_path / "tokenizer.json",
                 added=[AddedToken("        ", normalized=False), AddedToken("<tool>")])
    tokenizer, library = load_tokenizer(str(path)), Tokenizer.from_file(str(path))
    text = "def f():\n        return <tool> </s>"
    ids = tokenizer.encode(text.encode()).tolist()
    assert (library.token_to_id("        ") in ids and library.token_to_id("<tool>") in ids
            and library.token_to_id("</s>") not in ids)


def test_an_end_token_that_is_only_added_is_kept_out_of_text(tmp_path: Path) -> None:
    path = saved("byte-level BPE", tmp_path / "tokenizer.json", added=[AddedToken("<tool>")])
    tokenizer = load_tokenizer(str(path), end_token="<tool>")
    assert tokenizer.end_id not in tokenizer.encode(b"a <tool> b")


def test_a_word_of_the_vocabulary_that_is_special_is_not_found(tmp_path: Path) -> None:
    """With `ignore_merges`, and where words are looked up as a whole, the model itself knows the string."""
    vocabulary = {"</s>": 0, "<unk>": 1, "a": 2, "b": 3, "<": 4, "/": 5, "s": 6, ">": 7}
    for number, model in enumerate((models.BPE(vocabulary, [], ignore_merges=True),
                                    models.WordLevel(vocabulary, unk_token="<unk>"),
                                    models.BPE(vocabulary | {"</": 8, "s>": 9},
                                               [("<", "/"), ("s", ">"), ("</", "s>")]))):
        made = Tokenizer(model)
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        path = tmp_path / f"{number}.json"
        content = json.loads(made.to_str())
        content["added_tokens"] = [{"id": 0, "content": "</s>", "single_word": False, "lstrip": False,
                                    "rstrip": False, "normalized": False, "special": True}]
        path.write_text(json.dumps(content | {"added_tokens": []}))
        assert 0 not in load_tokenizer(str(path)).encode(b"a </s> b"), model          # a known name is enough
        path.write_text(json.dumps(content))
        assert 0 not in load_tokenizer(str(path)).encode(b"a </s> b"), model
        assert 0 in load_tokenizer(str(path), parse_special=True).encode(b"a </s> b"), model


def test_the_same_text_gives_the_same_ids(tmp_path: Path) -> None:
    path = saved("byte-level BPE", tmp_path / "tokenizer.json")
    content = json.loads(path.read_text())
    content["model"]["dropout"] = 0.5
    path.write_text(json.dumps(content))
    tokenizer = load_tokenizer(str(path))
    assert len({tuple(tokenizer.encode(TEXT.encode()).tolist()) for _ in range(5)}) == 1
