"""Text to token ids and back: bytes as they are, or any `tokenizer.json` of the tokenizers library.

A tokenizer adds no marks of its own to a text; `prepare` puts `end_id` after every document.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np

from moetrain.errors import DataError

_END_MARKS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "[SEP]")
_PIECE = 1 << 20        # bytes handed to the library at once; longer texts are cut at a line's end


class Tokenizer(Protocol):
    """vocab_size: ids run from 0 to vocab_size - 1, end_id included. identity: equal for equal tokenizers."""

    vocab_size: int
    end_id: int
    identity: str

    def encode(self, text: bytes) -> np.ndarray: ...

    def decode(self, ids: Iterable[int]) -> str: ...


class ByteTokenizer:
    """Id = byte; 256 ends a document."""

    vocab_size = 257
    end_id = 256
    identity = "bytes"

    def encode(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, np.uint8).astype(np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(int(id) for id in ids if 0 <= id < 256).decode("utf-8", "replace")


class FileTokenizer:
    """A `tokenizer.json`. Without a mark that ends a document it gets one more id for it."""

    def __init__(self, *, path: Path) -> None:
        from tokenizers import Tokenizer as Library

        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(20, "the tokenizer cannot be read", where=f"{path} (data.tokenizer)",
                            why=error.strerror or str(error),
                            next="data.tokenizer=bytes, or the path of a tokenizer.json") from error
        try:
            self._library = Library.from_str(content.decode("utf-8"))
        except Exception as error:              # the library raises plain Exception for a file it cannot read
            raise DataError(21, "the file is not a tokenizer", where=f"{path} (data.tokenizer)", why=str(error)[:200],
                            next="data.tokenizer=bytes, or a tokenizer.json of the tokenizers library") from error
        self._library.no_truncation()
        self._library.no_padding()
        vocabulary = self._library.get_vocab(with_added_tokens=True)
        size = max(vocabulary.values(), default=-1) + 1
        self.end_id = next((vocabulary[mark] for mark in _END_MARKS if mark in vocabulary), size)
        self.vocab_size = max(size, self.end_id + 1)
        self.identity = f"sha256:{hashlib.sha256(content).hexdigest()}"

    def encode(self, text: bytes) -> np.ndarray:
        pieces = [piece.decode("utf-8", "replace") for piece in _cut(text)]
        encoded = self._library.encode_batch(pieces, add_special_tokens=False)
        return np.concatenate([np.zeros(0, np.int64), *(np.asarray(piece.ids, np.int64) for piece in encoded)])

    def decode(self, ids: Iterable[int]) -> str:
        return self._library.decode([int(id) for id in ids if id != self.end_id], skip_special_tokens=True)


def load_tokenizer(name: str) -> Tokenizer:
    """`bytes`, or the path of a tokenizer.json."""
    return ByteTokenizer() if name == "bytes" else FileTokenizer(path=Path(name))


def _cut(text: bytes) -> list[bytes]:
    pieces, start = [], 0
    while start < len(text):
        end = min(start + _PIECE, len(text))
        if end < len(text):
            line = text.rfind(b"\n", start, end) + 1
            end = line if line > start else end
        pieces.append(text[start:end])
        start = end
    return pieces
