"""Token shards of documents that are at hand."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moetrain.data.tokens import token_dtype, write_shard


def write_documents(path: Path, documents: Sequence[np.ndarray], *, vocab_size: int, **rest: object) -> None:
    """A shard of documents; `rest` as `write_shard` takes it."""
    dtype = token_dtype(vocab_size)
    offsets = np.cumsum([0, *map(len, documents)])
    write_shard(path, tokens=np.concatenate([np.zeros(0, dtype), *documents]).astype(dtype), offsets=offsets, vocab_size=vocab_size,
                **rest)
