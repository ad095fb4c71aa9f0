"""Texts encoded in pieces: the ids of the whole text and byte counts that add up, for each tokenizer."""

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from moetrain.data.tokenizers import long_text
from moetrain.data.tokenizers.long_text import Encoded, Ids, LongTexts
from moetrain.data.tokenizers.tokenizer_json import FileTokenizer
from tests.support.tokenizers import KINDS, prose, saved

PIECE, ZONE = 900, 256
RUN = 3600
TEXTS = {
    "prose": prose(1, 1000), "no spaces": prose(2, 700).replace(" ", "").replace("\n", ""),
    "characters": "\u5b57" * RUN,
    "letter": "a" * RUN, "later letter": "b" + "a" * RUN, "spaces": "b " + " " * RUN + "c",
    "digits": "x12" + "7" * RUN, "emoji": "\U0001f468\u200d\U0001f469\u200d\U0001f467" * (RUN // 5),
    "marks": "e\u0301\u0323" * (RUN // 3),
    "pile of marks": "a" + "\u0301\u0323" * RUN + " b",
    "long words": " ".join("ab" * length for length in range(20, 80)),
    "special": "GPT-2 ends a text with <|endoftext|>, others with </s>. " * 60, "no text": "\u200b" * RUN,
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FileTokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {kind: FileTokenizer(path=saved(kind, folder / f"{number}.json"))
            for number, kind in enumerate(KINDS)}


def in_pieces(tokenizer: FileTokenizer, documents: list[list[bytes]],
              sizes: bool = True) -> list[list[Encoded]]:
    """The same as the tokenizer does, with small pieces."""
    texts = LongTexts(tokenizer._encode_batch, end_id=tokenizer.end_id, words=tokenizer._words, piece=PIECE,
                      zone=ZONE)
    found: list[list[Encoded]] = [[]]
    for encoded in texts.documents(documents, sizes=sizes):
        found[-1].append(encoded)
        if encoded.last:
            found.append([])
    assert found.pop() == []
    return found


def check(tokenizer: FileTokenizer, text: bytes, pieces: list[Encoded]) -> None:
    whole = tokenizer._encode_batch([text.decode("utf-8", "replace")], False)[0].ids
    ids, sizes = np.concatenate([piece.ids
                                 for piece in pieces]), np.concatenate([piece.sizes for piece in pieces])
    assert np.array_equal(ids, [*whole, tokenizer.end_id])
    assert (sizes >= 0).all() and sizes.sum() == sum(piece.text_bytes for piece in pieces) == len(text)
    assert len(ids) == len(sizes)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_give_the_ids_of_the_whole(tokenizers: dict[str, FileTokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    documents = [[text.encode()] for text in TEXTS.values()]
    for text, found in zip(TEXTS.values(), in_pieces(tokenizer, documents), strict=True):
        check(tokenizer, text.encode(), found)
    for found, again in zip(in_pieces(tokenizer, documents), in_pieces(tokenizer, documents, sizes=False),
                            strict=True):
        assert np.array_equal(np.concatenate([piece.ids for piece in found]),
                              np.concatenate([piece.ids for piece in again]))
        assert all(piece.sizes is None for piece in again)
    # they are joined, not encoded as one
    assert len(in_pieces(tokenizer, [[TEXTS["prose"].encode()]])[0]) > 5


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_random_texts_in_random_blocks(tokenizers: dict[str, FileTokenizer], kind: str,
                                       data: st.DataObject) -> None:
    letters = ["a", "aaaa", " ", "\n", "\u5b57", "\u00e9", "e\u0301", "\ufb01", "7", "</s>", "<|endoftext|>",
               "\U0001f600", "router ", "\u0130"]
    chance = random.Random(data.draw(st.integers(0, 1 << 30)))
    some = chance.sample(letters, chance.randint(1, 5))
    text = "".join(chance.choice(some) for _ in range(chance.randint(0, 1500))).encode()
    if chance.random() < 0.3:
        text = text.replace(b"a", b"\xe9", 3)
    cuts = [0, *sorted(chance.randint(0, len(text)) for _ in range(chance.randint(0, 4))), len(text)]
    blocks = [text[begin:end] for begin, end in zip(cuts, cuts[1:])]
    check(tokenizers[kind], text, in_pieces(tokenizers[kind], [blocks])[0])


def test_a_long_document_without_a_line_end(tokenizers: dict[str, FileTokenizer]) -> None:
    tokenizer, text = tokenizers["byte-fallback BPE"], "\u5b57" * (long_text.PIECE + 2 * long_text.ZONE)
    blocks = [text[begin:begin + 90_000].encode() for begin in range(0, len(text), 90_000)]
    pieces = list(tokenizer.encode_document(blocks))
    assert len(pieces) == 2
    check(tokenizer, text.encode(), pieces)
    assert tokenizer.decode(np.concatenate([piece.ids for piece in pieces]).tolist()) == text


def test_many_short_documents_are_encoded_together() -> None:
    batches = []

    def encode(texts: list[str], ends: bool) -> list[Ids]:
        batches.append(len(texts))
        return [Ids(np.arange(len(text)), None) for text in texts]

    found = list(LongTexts(encode, end_id=7).documents(([b"word"] for _ in range(5000)), sizes=False))
    assert len(found) == 5000 and all(encoded.last for encoded in found) and batches == [5000]


def test_a_tokenizer_that_reads_the_end_first_is_refused() -> None:
    def encode(texts: list[str], ends: bool) -> list[Ids]:
        """Ids of characters; those of x count from the start, and differ in texts of three pieces or more."""
        return [Ids(np.array([1000 + place % 5 if letter == "x" else ord(letter) + (len(text) > 3 * PIECE)
                              for place, letter in enumerate(text)]), None) for text in texts]

    text = prose(3, 400)[:2 * PIECE - ZONE].replace("x", "y").encode()
    odd = LongTexts(encode, end_id=0, piece=PIECE, zone=ZONE)
    with pytest.raises(long_text.UnjoinableError):
        list(odd.documents([[text + b"x" * 7 * PIECE]], sizes=False))


def test_equal_probabilities_in_a_long_word_are_taken_as_in_the_whole(tmp_path: Path) -> None:
    """Rounding decides between `aa` `a` and `a` `aa`, and depends on what stands before in the word."""
    vocabulary = [("<unk>", 0.0), ("a", -1.1), ("aa", -1.3), ("b", -0.7), ("c", -2.9)]
    library = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = FileTokenizer(path=tmp_path / "tokenizer.json", end_token="new")
    for seed in range(8):
        chance = random.Random(seed)
        text = "".join(chance.choice(["aaa", "b", "c", "aaaaa"]) for _ in range(2000)).encode()
        check(tokenizer, text, in_pieces(tokenizer, [[text]])[0])
        spaced = text.replace(b"cb", b" ")
        found = in_pieces(tokenizer, [[spaced]])[0]
        check(tokenizer, spaced, found)
        assert len(found) > 3
