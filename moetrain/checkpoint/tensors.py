"""Tensors of a checkpoint, read in rows as bytes that numpy holds; every byte is compared with its checksum.

This file imports no torch, and knows no dtype but its width: elements are unsigned numbers.
"""

from contextlib import ExitStack
from pathlib import Path

import numpy as np

from moetrain.checkpoint.manifest import read_manifest
from moetrain.checkpoint.payload import Payload
from moetrain.checkpoint.records import ITEM_BYTES, ByteRange, TensorEntry, row_bytes, row_count

_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class CheckpointTensors:
    """Tensors of a checkpoint by name. A context manager, which closes the files.

    Args:
        directory: of the checkpoint.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.manifest = directory, read_manifest(directory)
        self._stack = ExitStack()
        self._files: dict[str, Payload] = {}

    def __enter__(self) -> "CheckpointTensors":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors by name."""
        return {name: self.shape(name) for name in self.manifest.names()}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._entry(name).shape

    def dtype(self, name: str) -> str:
        """Dtype of a tensor."""
        return self._entry(name).dtype

    def read(self, name: str, first: int = 0, rows: int | None = None) -> np.ndarray:
        """Read rows [first, first + rows) of a tensor, all of a scalar."""
        entry = self._entry(name)
        width, count = row_bytes(entry), row_count(entry.shape)
        last = count if rows is None else first + rows
        content = bytearray()
        for chunk in sorted(entry.chunks, key=lambda chunk: chunk.first):
            begin, end = max(first, chunk.first), min(last, chunk.first + chunk.rows)
            if begin < end:
                part = ByteRange(chunk.begin, chunk.rows * width, name, entry.dtype, entry.shape, chunk.crcs)
                from_byte, to_byte = (begin - chunk.first) * width, (end - chunk.first) * width
                for block in self._file(chunk.file).blocks(part, self.manifest.block, from_byte, to_byte):
                    content += block
        shape = (last - first, *entry.shape[1:]) if entry.shape else ()
        return np.frombuffer(content, _WORDS[ITEM_BYTES[entry.dtype]]).reshape(shape)

    def _entry(self, name: str) -> TensorEntry:
        entry = self.manifest.entry(name)
        if entry is None:
            raise KeyError(name)
        return entry

    def _file(self, name: str) -> Payload:
        if name not in self._files:
            self._files[name] = self._stack.enter_context(
                Payload(self.directory / name, self.manifest.files[name]))
        return self._files[name]
