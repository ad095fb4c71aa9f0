"""Tokenizers of each kind, trained on the spot: a tokenizer.json of the tokenizers library."""

import random
from collections.abc import Callable
from pathlib import Path

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

WORDS = ("router expert token weight shard layer gate \u00fcber Stra\u00dfe caf\u00e9 na\u00efve "
         "2026 12345 0.5 don't (see) x=y; \u4f60\u597d \u4e16\u754c \u6a21\u578b "
         "\u0928\u092e\u0938\u094d\u0924\u0947 \u0645\u0631\u062d\u0628\u0627").split()
SPECIAL = ["<unk>", "</s>", "<|endoftext|>"]


def prose(seed: int, words: int) -> str:
    """Words of several scripts, with lines and paragraphs."""
    chance = random.Random(seed)
    gaps = (" ",) * 12 + ("\n", "\n\n", ", ", ". ")
    return "".join(chance.choice(WORDS) + chance.choice(gaps) for _ in range(words))


# Runs of a letter have tokens too, of several lengths: where such a run is cut decides which ones.
_RUNS = " ".join(letter * length for letter in ("a", "=", "7", "\u5b57", " ")
                 for length in (2, 3, 5, 8, 13)) + " "
_TRAINING = [prose(seed, 400) + 20 * _RUNS for seed in range(4)]


def byte_level_bpe(size: int = 600) -> Tokenizer:
    """As GPT-2 and most models after it."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    made.train_from_iterator(_TRAINING, trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return made


def _byte_fallback(first: bool) -> Tokenizer:
    alphabet = [f"<0x{number:02X}>" for number in range(256)]
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if first:                                        # Llama 2: a mark before the text, and no pre-tokenizer
        made.normalizer = normalizers.Sequence([
            normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    latin = [text.encode("ascii", "ignore").decode().replace("\n", " ") for text in _TRAINING]
    made.train_from_iterator([word for text in latin for word in text.split(" ")], trainers.BpeTrainer(
        vocab_size=256 + 300, special_tokens=[*SPECIAL, *alphabet], show_progress=False))
    for token in alphabet:                           # in the vocabulary, not special: as in a converted model
        assert made.token_to_id(token) is not None
    return _without_added(made, alphabet)


def _without_added(made: Tokenizer, tokens: list[str]) -> Tokenizer:
    import json

    content = json.loads(made.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in tokens]
    return Tokenizer.from_str(json.dumps(content))


def byte_fallback_bpe() -> Tokenizer:
    return _byte_fallback(True)


def metaspace_bpe() -> Tokenizer:
    return _byte_fallback(False)


def word_piece() -> Tokenizer:
    """As BERT: lowercase, no accents, unknown words are one token."""
    made = Tokenizer(models.WordPiece(unk_token="<unk>", max_input_chars_per_word=100))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.train_from_iterator(_TRAINING, trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=SPECIAL, show_progress=False))
    return made


def unigram() -> Tokenizer:
    """As T5: compatibility forms, a mark in front of every word."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" ", " ")])
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Metaspace(prepend_scheme="always")
    made.train_from_iterator(_TRAINING, trainers.UnigramTrainer(
        vocab_size=400, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False))
    return made


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level BPE": byte_level_bpe, "byte-fallback BPE": byte_fallback_bpe, "Metaspace BPE": metaspace_bpe,
    "WordPiece": word_piece, "Unigram": unigram,
}


def saved(kind: str, path: Path, added: list[AddedToken] | None = None) -> Path:
    """The file of a tokenizer. added: tokens that are looked for in text and are not special."""
    made = KINDS[kind]()
    made.add_tokens(added or [])
    made.save(str(path))
    return path
