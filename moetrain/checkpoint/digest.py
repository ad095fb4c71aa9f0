"""Digest of a set of weights: it names their content, whatever mesh, run or step has saved them.

A manifest has a CRC-32 for every block of every chunk. CRCs of consecutive bytes combine into that of all of
them, so the CRC of a whole tensor follows without reading it, however its rows were divided. The digest is
the SHA-256 of names, dtypes, shapes and these CRCs. It finds weights that were mixed up or altered by
accident; it is no protection against somebody who alters them so that the CRCs stay.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import lru_cache

from moetrain.checkpoint.records import Manifest, TensorEntry, row_bytes

_POLYNOMIAL = 0xEDB88320   # of CRC-32, reflected: the highest power of x is the lowest bit
WEIGHTS = ("model.", "buffer.")


def weights_digest(manifest: Manifest, prefixes: tuple[str, ...] = WEIGHTS) -> str:
    """Return the digest of the tensors whose names begin so, as 64 hexadecimal digits."""
    def records() -> Iterator[tuple[str, str, tuple[int, ...], int]]:
        for name in sorted(name for name in manifest.names() if name.startswith(prefixes)):
            entry = manifest.entry(name)
            assert entry is not None, name
            yield name, entry.dtype, entry.shape, tensor_crc(entry, manifest.block)

    return named_digest(records())


def named_digest(tensors: Iterable[tuple[str, str, tuple[int, ...], int]]) -> str:
    """Return the digest of tensors, as 64 hexadecimal digits.

    Args:
        tensors: name, dtype, shape and CRC-32 of each, ordered by name.
    """
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(json.dumps(tensor).encode())
    return found.hexdigest()


def tensor_crc(entry: TensorEntry, block: int) -> int:
    """CRC-32 of the content of a whole tensor, from those of its blocks.

    Args:
        entry: record of the tensor.
        block: bytes under one checksum.
    """
    crc = 0
    for chunk in entry.chunks:
        rest = chunk.rows * row_bytes(entry)
        for own in chunk.crcs:
            length = min(block, rest)
            crc, rest = combined(crc, own, length), rest - length
    return crc


def combined(first: int, second: int, length: int) -> int:
    """CRC-32 of two byte strings together, from that of each and the length of the second."""
    return _product(_power_of_x(8 * length), first) ^ second


@lru_cache(maxsize=4096)
def _power_of_x(exponent: int) -> int:
    """x to the power of `exponent`, modulo the polynomial."""
    result, square = 1 << 31, 1 << 30          # 1 and x
    while exponent:
        if exponent & 1:
            result = _product(result, square)
        square, exponent = _product(square, square), exponent >> 1
    return result


def _product(a: int, b: int) -> int:
    """Product of two polynomials over GF(2), modulo the polynomial."""
    result = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            result ^= b
        b = b >> 1 ^ _POLYNOMIAL if b & 1 else b >> 1
    return result
