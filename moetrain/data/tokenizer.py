"""Text to token ids and back: bytes as they are, or any `tokenizer.json` of the tokenizers library.

A tokenizer adds no marks of its own to a text; `prepare` puts `end_id` after every document.
"""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np

from moetrain.data.text import cut
from moetrain.errors import DataError
from moetrain.files import read_bytes, reason, shown

_END_MARKS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "[SEP]")
_MOST_BYTES = 256 << 20  # of a tokenizer.json; those of the largest vocabularies have 35 MB


class Tokenizer(Protocol):
    """vocab_size: ids run from 0 to vocab_size - 1, end_id included. identity: equal for equal tokenizers. content: of the
    file that it was made of, if there is one."""

    vocab_size: int
    end_id: int
    identity: str
    content: bytes | None

    def encode(self, text: bytes) -> np.ndarray: ...

    def decode(self, ids: Iterable[int]) -> str: ...


class ByteTokenizer:
    """Id = byte; 256 ends a document."""

    vocab_size = 257
    end_id = 256
    identity = "bytes"
    content = None

    def encode(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, np.uint8).astype(np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(int(id) for id in ids if 0 <= id < 256).decode("utf-8", "replace")


class FileTokenizer:
    """A `tokenizer.json`. Without a mark that ends a document it gets one more id for it."""

    def __init__(self, *, path: Path) -> None:
        from tokenizers import Tokenizer as Library

        self._where = f"{path} (data.tokenizer)"
        try:
            self.content = read_bytes(path, limit=_MOST_BYTES)
        except OSError as error:
            raise DataError(20, "the tokenizer cannot be read", where=self._where, why=reason(error),
                            next="data.tokenizer=bytes, or the path of a tokenizer.json") from error
        with self._refused(21, "the file is not a tokenizer"):
            self._library = Library.from_str(self.content.decode("utf-8"))
            self._library.no_truncation()
            self._library.no_padding()
        vocabulary = self._library.get_vocab(with_added_tokens=True)
        size = max(vocabulary.values(), default=-1) + 1
        self.end_id = next((vocabulary[mark] for mark in _END_MARKS if mark in vocabulary), size)
        self.vocab_size = max(size, self.end_id + 1)
        self.identity = f"sha256:{hashlib.sha256(self.content).hexdigest()}"

    def encode(self, text: bytes) -> np.ndarray:
        pieces = [piece.decode("utf-8", "replace") for piece in cut(text)]
        with self._refused(120, "the tokenizer fails on what it is given"):
            encoded = self._library.encode_batch(pieces, add_special_tokens=False)
        return np.concatenate([np.zeros(0, np.int64), *(np.asarray(piece.ids, np.int64) for piece in encoded)])

    def decode(self, ids: Iterable[int]) -> str:
        with self._refused(120, "the tokenizer fails on what it is given"):
            return self._library.decode([int(id) for id in ids if id != self.end_id], skip_special_tokens=True)

    @contextmanager
    def _refused(self, number: int, what: str) -> Iterator[None]:
        """What the library raises in the block becomes a DataError. It is written in Rust, and raises plain Exception, or
        for a file it did not expect a panic, which is a BaseException of a module that cannot be imported."""
        try:
            yield
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise DataError(number, what, where=self._where, why=shown(reason(error), 200),
                            next="data.tokenizer=bytes, or a tokenizer.json of the tokenizers library") from error


def load_tokenizer(name: str) -> Tokenizer:
    """`bytes`, or the path of a tokenizer.json."""
    return ByteTokenizer() if name == "bytes" else FileTokenizer(path=Path(name))
