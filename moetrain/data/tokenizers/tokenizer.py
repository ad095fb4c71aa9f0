"""Text to token ids and back: bytes as they are, or any `tokenizer.json` of the tokenizers library (data/tokenizers/tokenizer_json.py).

A tokenizer adds no marks of its own to a text; behind every document comes `end_id`.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from moetrain.config.schema import DataConfig
from moetrain.data.tokenizers.long_text import Encoded
from moetrain.errors import DataError


class Tokenizer(Protocol):
    """vocab_size: ids run from 0 to vocab_size - 1, end_id included. identity: equal for equal tokenizers. content: of the
    file that it was made of, if there is one. parse_special: whether special strings inside a text are special tokens."""

    vocab_size: int
    end_id: int
    identity: str
    content: bytes | None
    parse_special: bool

    def encode(self, text: bytes) -> np.ndarray:
        """The ids of a text alone."""
        ...

    def encode_document(self, blocks: Iterable[bytes]) -> Iterator[Encoded]:
        """The ids of a document with the end id behind it, and the bytes that each covers."""
        ...

    def encode_documents(self, documents: Iterable[Iterable[bytes]], *, sizes: bool) -> Iterator[Encoded]:
        """The same of many documents, one after another. sizes: whether the bytes of each token are wanted."""
        ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def count_special(self, ids: np.ndarray) -> int:
        """How many ids are those of special tokens."""
        ...


class ByteTokenizer:
    """Id = byte; 256 ends a document."""

    vocab_size = 257
    end_id = 256
    identity = "bytes"
    content = None
    parse_special = False

    def encode(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, np.uint8).astype(np.int64)

    def encode_document(self, blocks: Iterable[bytes]) -> Iterator[Encoded]:
        return self.encode_documents([blocks], sizes=True)

    def encode_documents(self, documents: Iterable[Iterable[bytes]], *, sizes: bool) -> Iterator[Encoded]:
        end, nothing = np.array([self.end_id], np.int64), np.zeros(1, np.int64)
        for blocks in documents:
            for block in blocks:
                ids = self.encode(block)
                yield Encoded(ids, np.ones_like(ids) if sizes else None, len(block), False)
            yield Encoded(end, nothing if sizes else None, 0, True)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(int(id) for id in ids if 0 <= id < 256).decode("utf-8", "replace")

    def count_special(self, ids: np.ndarray) -> int:
        return int((ids >= 256).sum())


def load_tokenizer(name: str, *, end_token: str | None = None, end_id: int | None = None,
                   parse_special: bool = False) -> Tokenizer:
    """A tokenizer.

    Args:
        name: `bytes`, or the path of a tokenizer.json or of a folder that holds one.
        end_token: the token of a tokenizer.json that ends a document, `new` for one more id; None: as its files say.
        end_id: the id that ends a document, where that is known.
        parse_special: whether special strings inside a text are special tokens.
    """
    if name != "bytes":
        # Not before it is needed: the tokenizers library takes a while to load.
        from moetrain.data.tokenizers.tokenizer_json import FileTokenizer

        return FileTokenizer(path=Path(name), end_token=end_token, end_id=end_id, parse_special=parse_special)
    if end_token is not None or parse_special:
        key = "data.end_token" if end_token is not None else "data.parse_special"
        raise DataError(156, f"{key} is for a tokenizer.json", where=f"data.tokenizer=bytes, {key}",
                        why="bytes have no special tokens; 256 ends a document",
                        next=f"~{key}, or data.tokenizer=<tokenizer.json>")
    encoder = ByteTokenizer()
    encoder.end_id = encoder.end_id if end_id is None else end_id
    return encoder


def configured_tokenizer(data: DataConfig) -> Tokenizer:
    """The tokenizer of data.tokenizer, with what else the config says of it."""
    return load_tokenizer(data.tokenizer, end_token=data.end_token, parse_special=data.parse_special)
