"""Streaming decoder: complete characters only, and nothing of the prompt."""

from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer as Library, decoders, models, normalizers, pre_tokenizers, trainers

from moetrain.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from moetrain.generate.characters import REPLACEMENT, StreamingDecoder

TEXT = ["the cat sat on the mat, and the dog ran after the cat. ", "über Straße fährt ein Wagen. "] * 30
ALPHABET = st.text(st.sampled_from("abc the,.é字漢🙂👩‍👧ا \n"), max_size=24)


def byte_level() -> Library:
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.train_from_iterator(TEXT, trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"], show_progress=False))
    return library


def byte_fallback() -> Library:
    """Tokenizer like Llama's: a leading space, a letter for spaces, bytes for unknown characters."""
    library = Library(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    marks = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    library.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=400, special_tokens=marks, show_progress=False))
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    return _without_special_bytes(library)


def _without_special_bytes(library: Library) -> Library:
    import json

    content = json.loads(library.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"]
                               if not token["content"].startswith("<0x")]
    return Library.from_str(json.dumps(content))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder: Path = tmp_path_factory.mktemp("tokenizers")
    found = {"bytes": load_tokenizer("bytes")}
    for name, make in (("byte_level", byte_level), ("byte_fallback", byte_fallback)):
        make().save(str(folder / f"{name}.json"))
        found[name] = load_tokenizer(str(folder / f"{name}.json"))
    return found


KINDS = ("bytes", "byte_level", "byte_fallback")


def pieces(tokenizer: Tokenizer, before: list[int], ids: list[int]) -> list[str]:
    characters = StreamingDecoder(tokenizer, before)
    return [*(characters.add(id) for id in ids), characters.rest()]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(prompt=ALPHABET, text=ALPHABET)
def test_pieces_of_whole_characters_add_up_to_the_text(tokenizers, kind, prompt, text):
    """Wherever the prompt ends, the pieces equal the decoded whole without the prompt."""
    tokenizer = tokenizers[kind]
    ids = [int(id) for id in tokenizer.encode((prompt + text).encode())]
    before = [int(id) for id in tokenizer.encode(prompt.encode())]
    if ids[:len(before)] != before:                      # a token reaches from one into the other
        return
    found = pieces(tokenizer, before, ids[len(before):])
    if prompt or kind != "byte_fallback":
        assert "".join(found) == text
    else:
        assert "".join(found) == tokenizer.decode(ids)
    assert not any(REPLACEMENT in piece for piece in found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["ab 字", "字", "🙂", "the 🙂🙂"])
def test_an_end_inside_a_character_is_left_out_and_the_rest_stays(tokenizers, kind, text):
    tokenizer = tokenizers[kind]
    ids = [int(id) for id in tokenizer.encode(text.encode())]
    for left_out in (1, 2):
        assert "".join(pieces(tokenizer, [], ids[:-left_out])) == text[:-1]


def test_a_character_appears_with_its_last_token(tokenizers):
    for kind in KINDS:
        tokenizer = tokenizers[kind]
        before, ids = ([int(id) for id in tokenizer.encode(text.encode())] for text in ("the ", "the 字漢"))
        found = pieces(tokenizer, before, ids[len(before):])
        assert found == ["", "", "字", "", "", "漢", ""], kind


def test_bytes_that_are_no_character_are_shown_and_do_not_hold_up_the_next(tokenizers):
    assert ("".join(pieces(tokenizers["bytes"], [], [0xFF, 0x61, 0xC3, 0x62]))
            == f"{REPLACEMENT}a{REPLACEMENT}b")
    bad, good = (tokenizers["byte_fallback"]._library.token_to_id(token) for token in ("<0xFF>", "a"))
    assert "".join(pieces(tokenizers["byte_fallback"], [], [bad, good])) == f"{REPLACEMENT}a"
