"""Tokenizer of documents from any `tokenizer.json` of the tokenizers library.

A text encodes to what the library makes of it as a whole, without special tokens of its own. `long_text.py`
encodes texts of any length, `special_strings.py` keeps special strings in a text from becoming tokens,
`end_token.py` finds the end token.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moetrain.data.tokenizers.end_token import KNOWN, find_end_id
from moetrain.data.tokenizers.long_text import Encoded, Ids, LongTexts, UnjoinableError, Words
from moetrain.data.tokenizers.source import find_tokenizer
from moetrain.data.tokenizers.special_strings import without_processing, without_special
from moetrain.errors import DataError
from moetrain.files import reason, shown

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

_VERSION = 2                 # raise it when the same text gives different ids


class FileTokenizer:
    """Tokenizer read from a tokenizer.json.

    Args:
        path: the file, or a folder that holds it.
        end_token: token that ends a document, or `new` for one more id; None takes it from the tokenizer's
            files.
        end_id: the id that ends a document, where a prepared folder gives it.
        parse_special: whether special strings inside a text become the tokens of that name.
    """

    def __init__(self, *, path: Path, end_token: str | None = None, end_id: int | None = None,
                 parse_special: bool = False) -> None:
        source = find_tokenizer(path)
        self.content, self._where = source.content, f"{source.path} (data.tokenizer)"
        with self._refused(21, "the file is not a tokenizer"):
            self._library = _library(source.content)
            vocabulary = self._library.get_vocab(with_added_tokens=True)
            self._added = {token.content: token.special
                           for token in self._library.get_added_tokens_decoder().values()}
        special = [token for token, is_special in self._added.items() if is_special]
        size = max(vocabulary.values(), default=-1) + 1
        self.end_id = find_end_id(source, vocabulary, special, end_token) if end_id is None else end_id
        self.vocab_size = max(size, self.end_id + 1)
        self.parse_special = parse_special
        self._special = self._special_tokens(special, vocabulary)
        said = f" end={self.end_id}" + (" parse_special" if parse_special else "")
        self.identity = f"tokenizer-{_VERSION} sha256:{hashlib.sha256(self.content).hexdigest()}{said}"

    def encode(self, text: bytes) -> np.ndarray:
        """The ids of a text, int64 [tokens], without an end id."""
        return np.concatenate([piece.ids for piece in self.encode_documents([[text]], sizes=False)])[:-1]

    def encode_document(self, blocks: Iterable[bytes]) -> Iterator[Encoded]:
        return self.encode_documents([blocks], sizes=True)

    def encode_documents(self, documents: Iterable[Iterable[bytes]], *, sizes: bool) -> Iterator[Encoded]:
        try:
            yield from LongTexts(self._encode_batch, end_id=self.end_id,
                                 words=self._words).documents(documents, sizes=sizes)
        except UnjoinableError as error:
            raise DataError(154, "a text is too long for this tokenizer", where=self._where,
                            why="what it makes of the start of the text depends on its far end, so that it "
                                "cannot be encoded in pieces",
                            next="cut the text into documents (data.separator), or take another "
                                 "data.tokenizer") from error

    def decode(self, ids: Iterable[int]) -> str:
        with self._refused(120, "the tokenizer fails on what it is given"):
            return self._library.decode([int(id) for id in ids if id != self.end_id],
                                        skip_special_tokens=True)

    def count_special(self, ids: np.ndarray) -> int:
        """Number of ids that are special tokens."""
        return int(np.isin(ids, list(self._special.values())).sum())

    def _special_tokens(self, special: list[str], vocabulary: dict[str, int]) -> dict[str, int]:
        """Tokens that no text encodes to, with their ids: the special ones and the end token.

        DataError where the end token is an ordinary token that text encodes to, and not one of the well-known
        names.
        """
        end = next((token for token, id in vocabulary.items() if id == self.end_id), None)
        if end is None or end in special:
            return {token: vocabulary[token] for token in special}
        if end not in self._added and end not in KNOWN:
            with self._refused(120, "the tokenizer fails on what it is given"):
                found = self._library.encode(end, add_special_tokens=False).ids
            if self.end_id in found:
                raise DataError(155, "the token that is to end a document also comes in text",
                                where=f"{self._where}, data.end_token",
                                why=f"{end!r} is an ordinary token of the vocabulary",
                                next="data.end_token=<one of its special tokens>, or data.end_token=new")
        return {token: vocabulary[token] for token in [*special, end]}

    @cached_property
    def _encoder(self) -> "Library":
        """The library's tokenizer, changed as texts are encoded with it."""
        with self._refused(21, "the file is not a tokenizer"):
            tokenizer = without_processing(self.content)
            if not self.parse_special:
                tokenizer = without_special(tokenizer, self._special)
            return _library(json.dumps(tokenizer, ensure_ascii=False).encode())

    @cached_property
    def _words(self) -> Words | None:
        """For Unigram, the function that numbers words, since its pieces join only between words."""
        return self._word_numbers if type(self._library.model).__name__ == "Unigram" else None

    def _word_numbers(self, text: str) -> np.ndarray:
        """int64 [tokens], number of the word that each token is in; -1 for a token in none."""
        with self._refused(120, "the tokenizer fails on what it is given"):
            words = self._encoder.encode(text, add_special_tokens=False).word_ids
        return np.array([-1 if word is None else word for word in words], np.int64)

    def _encode_batch(self, texts: list[str], ends: bool) -> list[Ids]:
        encoder = self._encoder
        with self._refused(120, "the tokenizer fails on what it is given"):
            if not ends:
                return [Ids(np.array(found.ids, np.int64), None)
                        for found in encoder.encode_batch_fast(texts, add_special_tokens=False)]
            return [Ids(np.array(found.ids, np.int64), np.array([end for _, end in found.offsets], np.int64))
                    for found in encoder.encode_batch(texts, add_special_tokens=False)]

    @contextmanager
    def _refused(self, number: int, what: str) -> Iterator[None]:
        """Turn what the library raises inside the block into a DataError.

        The library is written in Rust. It raises plain Exception, or for an unexpected file a panic, which is
        a BaseException of a module that cannot be imported.
        """
        try:
            yield
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise DataError(number, what, where=self._where, why=shown(reason(error), 200),
                            next="data.tokenizer=bytes, or a tokenizer.json of the tokenizers "
                                 "library") from error


def _library(content: bytes) -> "Library":
    from tokenizers import Tokenizer

    library = Tokenizer.from_str(content.decode("utf-8"))
    library.no_truncation()
    library.no_padding()
    return library
