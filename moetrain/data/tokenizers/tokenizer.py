"""Tokenizers: text to token ids and back, as bytes or by a `tokenizer.json` of the tokenizers library.

This module holds the interface and the byte tokenizer; `tokenizer_json.py` holds the other one. A tokenizer
adds no special tokens to a text; `end_id` follows every document.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from moetrain.config.schema import DataConfig
from moetrain.data.tokenizers.long_text import Encoded
from moetrain.errors import DataError


class Tokenizer(Protocol):
    """Interface of a tokenizer.

    Args:
        vocab_size: ids run from 0 to vocab_size - 1, end_id included.
        end_id: the id that follows every document.
        identity: a string that is equal for equal tokenizers.
        content: bytes of the file that the tokenizer was built from; None where there is none.
        parse_special: whether special strings inside a text become special tokens.
    """

    vocab_size: int
    end_id: int
    identity: str
    content: bytes | None
    parse_special: bool

    def encode(self, text: bytes) -> np.ndarray:
        """The ids of a text, int64 [tokens], without an end id."""
        ...

    def encode_document(self, blocks: Iterable[bytes]) -> Iterator[Encoded]:
        """The ids of a document, then the end id, with the bytes that each of them covers."""
        ...

    def encode_documents(self, documents: Iterable[Iterable[bytes]], *, sizes: bool) -> Iterator[Encoded]:
        """The ids of many documents, one after another. `sizes`: also the bytes of each token."""
        ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def count_special(self, ids: np.ndarray) -> int:
        """Number of ids that are special tokens."""
        ...


class ByteTokenizer:
    """Tokenizer whose ids are the bytes of the text; 256 ends a document."""

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
    """Load a tokenizer by name.

    Args:
        name: `bytes`, or the path of a tokenizer.json or of a folder that holds one.
        end_token: token of the tokenizer.json that ends a document, or `new` for one more id; None takes the
            one that the tokenizer's files name.
        end_id: the id that ends a document, where it is known.
        parse_special: whether special strings inside a text become special tokens.
    """
    if name != "bytes":
        # Imported only when used: the tokenizers library takes a while to load.
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
    """The tokenizer that the config names, with its end token and its handling of special strings."""
    return load_tokenizer(data.tokenizer, end_token=data.end_token, parse_special=data.parse_special)
