"""Token shards of documents that are at hand, and shards whose header was changed."""

import json
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moetrain.data.tokens.shards import token_dtype, write_shard


def write_documents(path: Path, documents: Sequence[np.ndarray], *, vocab_size: int, **rest: object) -> None:
    """A shard of documents; `rest` as `write_shard` takes it."""
    dtype = token_dtype(vocab_size)
    offsets = np.cumsum([0, *map(len, documents)])
    tokens = np.concatenate([np.zeros(0, dtype), *documents]).astype(dtype)
    write_shard(path, tokens=tokens, offsets=offsets, vocab_size=vocab_size, **rest)


def with_header(path: Path, **changes: object) -> Path:
    """The shard with changed header entries and a right checksum: what a hostile file looks like."""
    raw = path.read_bytes()
    length = struct.unpack_from("<I", raw, 12)[0]
    header = json.loads(raw[20:20 + length]) | changes
    encoded = json.dumps(header).encode()
    prefix = struct.pack("<8sIII", raw[:8], 1, len(encoded), zlib.crc32(encoded))
    path.write_bytes(prefix + encoded + raw[20 + length:])
    return path
