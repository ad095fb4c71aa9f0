"""Safetensors files of strangers: the header is parsed here, with everything in it doubted.

    8 bytes     length of the header, little-endian
    header      JSON {"__metadata__": {...}, name: {"dtype", "shape", "data_offsets"}}
    content     the tensors

Checked at opening: the header is JSON of a sensible length, no name stands in it twice, dtypes are known,
shapes are whole numbers, and the tensors cover the content without gap or overlap. So a truncated file is
found before anything is read. Whatever is wrong raises CheckpointError, which names file and tensor.

Checkpoints of ours have checksums and a manifest instead (checkpoint/payload.py).
"""

import json
import os
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from moetrain.checkpoint.records import ITEM_BYTES
from moetrain.errors import CheckpointError
from moetrain.files import open_descriptor, reason
from moetrain.parallel.state_shards import DTYPES

LONGEST_HEADER = 100 << 20         # bytes; the safetensors library has the same limit


class StoredTensor(NamedTuple):
    """A tensor of a file.

    Attributes:
        dtype: as safetensors spells it: BF16, F32, …
        shape: of the whole tensor.
        begin: its first byte in the file.
        size: its bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    size: int


def damaged(path: Path, why: str) -> CheckpointError:
    """Return the error of a file of weights that is not what it says."""
    return CheckpointError(21, "a file of weights is damaged", where=str(path), why=why,
                           next="fetch or copy the file again, and compare its size with that at its source")


class ShardFile:
    """Safetensors file, open for reading.

    Args:
        path: the file; a link to one will do, as in caches of Hugging Face's hub.

    Attributes:
        tensors: by name, in the order of their bytes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = open_descriptor(path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(
                22, "a file of weights cannot be opened", where=str(path), why=reason(error),
                next="fetch or copy it again: the index of the folder names it") from error
        try:
            self.tensors = self._header()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def read(self, name: str, first: int = 0, rows: int | None = None) -> Tensor:
        """Read a tensor, or `rows` of its rows from `first` on, in the dtype in which it is stored."""
        stored = self.tensors[name]
        shape, begin = stored.shape, stored.begin
        if rows is not None:
            assert shape and 0 <= first and first + rows <= shape[0], (name, shape, first, rows)
            begin += first * (stored.size // max(1, shape[0]))
            shape = (rows, *shape[1:])
        tensor = torch.empty(shape, dtype=DTYPES[stored.dtype])
        into = memoryview(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")
        done = 0
        while done < len(into):
            read = os.preadv(self._descriptor, [into[done:]], begin + done)
            if not read:
                raise damaged(self.path, f"it ends inside {name}")
            done += read
        return tensor

    def _header(self) -> dict[str, StoredTensor]:
        size = os.fstat(self._descriptor).st_size
        length = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
        if size < 8 or not 2 <= length <= min(size - 8, LONGEST_HEADER):
            raise damaged(self.path, f"it has {size:,} bytes, and says that {length:,} are its header")
        try:
            header = json.loads(os.pread(self._descriptor, length, 8), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise damaged(self.path, f"its header: {error or 'it is nested too deep'}") from None
        if not isinstance(header, dict):
            raise damaged(self.path, "its header is no JSON object")
        begin, found = 8 + length, dict[str, StoredTensor]()
        for name, said in header.items():
            if name != "__metadata__":
                found[name] = self._stored(name, said, begin)
        found = dict(sorted(found.items(), key=lambda item: (item[1].begin, item[1].size)))
        end = begin
        for name, stored in found.items():
            if stored.begin != end:
                raise damaged(self.path, f"the bytes of {name} begin at {stored.begin:,}, and those before "
                                         f"it end at {end:,}")
            end += stored.size
        if end != size:
            raise damaged(self.path, f"it has {size:,} bytes, and its tensors end at {end:,}")
        return found

    def _stored(self, name: str, said: Any, base: int) -> StoredTensor:
        """Check what the header says of a tensor."""
        read = said if isinstance(said, dict) else {}
        dtype, shape, offsets = read.get("dtype"), read.get("shape"), read.get("data_offsets")
        if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
            raise CheckpointError(
                23, f"{name} is of a dtype that is not read: {dtype}", where=str(self.path),
                why=f"read are {', '.join(ITEM_BYTES)}",
                next="convert it to bfloat16 with the program that wrote it")
        if not (_whole(shape) and _whole(offsets) and len(offsets) == 2):
            raise damaged(self.path, f"shape or place of {name}: {str(said)[:100]}")
        size = prod(shape) * ITEM_BYTES[dtype]
        if offsets[1] - offsets[0] != size:
            raise damaged(self.path, f"{name} has {offsets[1] - offsets[0]:,} bytes, and {dtype} {shape} "
                                     f"needs {size:,}")
        return StoredTensor(dtype, tuple(shape), base + offsets[0], size)


def _whole(numbers: Any) -> TypeGuard[list[int]]:
    return isinstance(numbers, list) and all(
        type(number) is int and 0 <= number < 1 << 62 for number in numbers)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice} stands in it twice")
    return found
