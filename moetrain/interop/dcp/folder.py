"""A checkpoint folder of another program, open for reading: torch DCP, or safetensors of any kind.

    with open_stored(Path("checkpoints/step-100")) as folder:
        for name in folder.tensors:
            rows = folder.read(name, 0, 4)      # numpy, elements as unsigned numbers of their width

Opening reads what describes the tensors alone, and checks it whole: every chunk lies in its tensor and in its
file, no two share elements or bytes, none is missing. Whatever is wrong raises CheckpointError
(E-CHECKPOINT-031 to 034). No pickle is run, and no torch is imported.
"""

import os
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from math import prod
from pathlib import Path

import numpy as np

from moetrain.errors import CheckpointError
from moetrain.files import lies_inside, nearby, open_descriptor, read_bytes, reason
from moetrain.interop.dcp.coverage import Unchecked, faults
from moetrain.interop.dcp.metadata import read_metadata
from moetrain.interop.dcp.pickles import PickleError
from moetrain.interop.dcp.records import (
    ELEMENT_BYTES,
    METADATA,
    StoredChunk,
    StoredTensor,
    damaged,
    not_whole,
    outside,
)
from moetrain.interop.dcp.safetensors_files import read_safetensors
from moetrain.interop.dcp.torch_zip import ZippedTensor, read_zipped_tensor

MOST_METADATA = 1 << 30  # bytes
_MOST_OPEN = 64          # files
_SHOWN = 5               # faults of one kind in a message
_BLOCK = 16 << 20        # bytes read at once to compare a checksum
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def open_stored(directory: Path) -> "StoredFolder":
    """Open a foreign checkpoint folder, by its kind."""
    kind = DcpFolder if (directory / METADATA).is_file() else SafetensorsFolder
    return kind(directory)


class StoredFolder:
    """Tensors of a folder by name, read in rows. A context manager, which closes the files.

    Args:
        directory: the folder.
        tensors: what it holds.
        others: places of what is no tensor, by name.

    Attributes:
        kind: format of the folder, in words.
    """

    kind = ""

    def __init__(self, directory: Path, tensors: dict[str, StoredTensor],
                 others: dict[str, StoredChunk]) -> None:
        self.directory, self.tensors, self.others = directory, tensors, others
        self._descriptors: dict[str, int] = {}
        try:
            self._check_places()
            self._check_coverage()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "StoredFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self.tensors[name].shape

    def dtype(self, name: str) -> str:
        """Dtype of a tensor, as safetensors names it."""
        return self.tensors[name].dtype

    def bytes_of(self, name: str) -> int:
        """Bytes of a tensor."""
        tensor = self.tensors[name]
        return prod(tensor.shape) * ELEMENT_BYTES[tensor.dtype]

    def read(self, name: str, first: int = 0, rows: int | None = None) -> np.ndarray:
        """Read rows [first, first + rows) of a tensor, all of a scalar; elements as unsigned numbers."""
        tensor = self.tensors[name]
        shape = tensor.shape
        if shape:
            shape = (shape[0] - first if rows is None else rows, *shape[1:])
        out = np.empty(shape, _WORDS[ELEMENT_BYTES[tensor.dtype]])
        for chunk in tensor.chunks:
            begin, end = 0, 1
            if shape:
                begin = max(first, chunk.offsets[0])
                end = min(first + shape[0], chunk.offsets[0] + chunk.sizes[0])
            if begin >= end:
                continue
            part = self._rows_of_chunk(name, chunk, begin, end)
            inner = tuple(slice(offset, offset + size)
                          for offset, size in zip(chunk.offsets[1:], chunk.sizes[1:]))
            out[(slice(begin - first, end - first), *inner) if shape else ()] = part
        return out

    def check_content(self, name: str, progress: Callable[[int], None]) -> Iterator[str]:
        """Yield what is wrong with the bytes of a tensor; formats without checksums have nothing to say."""
        yield from ()

    def _layout(self, name: str, chunk: StoredChunk) -> tuple[int, tuple[int, ...]]:
        """First byte of a chunk's first element in its file, and strides in elements."""
        raise NotImplementedError

    def _rows_of_chunk(self, name: str, chunk: StoredChunk, begin: int, end: int) -> np.ndarray:
        """Rows [begin, end) of a tensor, as far as a chunk holds them."""
        size = ELEMENT_BYTES[self.tensors[name].dtype]
        place, strides = self._layout(name, chunk)
        shape = (end - begin, *chunk.sizes[1:]) if chunk.sizes else ()
        if shape:
            place += (begin - chunk.offsets[0]) * strides[0] * size
        span = 1 + sum((full - 1) * stride for full, stride in zip(shape, strides))
        content = np.frombuffer(self._read(chunk.file, place, span * size), _WORDS[size])
        return np.lib.stride_tricks.as_strided(content, shape, [stride * size for stride in strides],
                                               writeable=False)

    def _read(self, file: str, begin: int, length: int) -> bytes:
        """Read bytes of a file; the folder is damaged where it ends before."""
        content = bytearray()
        while len(content) < length:
            part = os.pread(self._descriptor(file), length - len(content), begin + len(content))
            if not part:
                raise damaged(self.directory / file, f"it ends at byte {begin + len(content)}")
            content += part
        return bytes(content)

    def _descriptor(self, file: str) -> int:
        """Descriptor of a file; those used longest ago are closed, since each rank wrote a file or more."""
        descriptor = self._descriptors.pop(file, None)
        if descriptor is None:
            if not lies_inside(self.directory, file):
                raise outside(self.directory, file)
            try:
                descriptor = open_descriptor(self.directory / file, os.O_RDONLY)
            except OSError as error:
                raise damaged(
                    self.directory / file, f"it cannot be read: {reason(error)}",
                    "copy the folder again with all of its files: each rank writes its own") from error
            if len(self._descriptors) >= _MOST_OPEN:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
        self._descriptors[file] = descriptor
        return descriptor

    def _check_places(self) -> None:
        """Check that all chunks lie in files that are there, and no two in the same bytes."""
        places: dict[str, list[tuple[int, int, str]]] = {}
        for name, tensor in self.tensors.items():
            for chunk in tensor.chunks:
                places.setdefault(chunk.file, []).append((chunk.begin, chunk.length, name))
        for name, chunk in self.others.items():
            places.setdefault(chunk.file, []).append((chunk.begin, chunk.length, name))
        for file, ranges in places.items():
            size = os.fstat(self._descriptor(file)).st_size
            ranges.sort()
            end, before = 0, ""
            for begin, length, name in ranges:
                if begin < end and length:
                    why = f"{name}, at byte {begin}, and {before}, up to {end}, lie in the same bytes"
                    raise damaged(self.directory / file, why)
                end, before = begin + length, name
                if end > size:
                    raise damaged(self.directory / file, f"{name} ends at byte {end}, the file at "
                                  f"{size}: it is truncated")

    def _check_coverage(self) -> None:
        """Check that the chunks of every tensor hold each element once."""
        for name, tensor in self.tensors.items():
            try:
                found = list(islice(faults(tensor.shape, tensor.chunks), _SHOWN))
            except Unchecked as error:
                found = [str(error)]
            if found:
                raise not_whole(self.directory, name, f"of its shape {list(tensor.shape)} {'; '.join(found)}")


class DcpFolder(StoredFolder):
    """Folder of torch.distributed.checkpoint: `.metadata`, and a file or more of each rank.

    Args:
        directory: the folder.
    """

    kind = "torch DCP"

    def __init__(self, directory: Path) -> None:
        path = directory / METADATA
        try:
            tensors, others = read_metadata(read_bytes(path, limit=MOST_METADATA))
        except (OSError, ValueError) as error:
            why = reason(error) if isinstance(error, OSError) else str(error)
            raise CheckpointError(
                31, "the metadata of a checkpoint folder is damaged, or none of tensors", where=str(path),
                why=why, next="save the tensors alone with torch.distributed.checkpoint, or restore the "
                              "file; it is never run, whatever it holds") from error
        self._views: dict[tuple[str, int], ZippedTensor] = {}
        super().__init__(directory, tensors, others)

    def check_content(self, name: str, progress: Callable[[int], None]) -> Iterator[str]:
        """Yield each chunk of a tensor whose bytes differ from their CRC-32."""
        for chunk in self.tensors[name].chunks:
            view, crc = self._view(name, chunk), 0
            first, length = view.storage
            for place in range(first, first + length, _BLOCK):
                block = self._read(chunk.file, place, min(_BLOCK, first + length - place))
                crc = zlib.crc32(block, crc)
                progress(len(block))
            if crc != view.crc:
                yield (f"{nearby(self.directory / chunk.file)}: the chunk of {name} at {list(chunk.offsets)} "
                       "does not match its checksum")

    def _layout(self, name: str, chunk: StoredChunk) -> tuple[int, tuple[int, ...]]:
        view = self._view(name, chunk)
        return view.begin, view.strides

    def _view(self, name: str, chunk: StoredChunk) -> ZippedTensor:
        """Tensor in the archive of a chunk, which must be what the metadata says."""
        key = chunk.file, chunk.begin
        if key not in self._views:
            tensor = self.tensors[name]
            try:
                view = read_zipped_tensor(partial(self._read, chunk.file), chunk.begin, chunk.length)
                if (view.dtype, view.shape) != (tensor.dtype, chunk.sizes):
                    raise PickleError(f"it is {view.dtype} {list(view.shape)}, and {METADATA} says "
                                      f"{tensor.dtype} {list(chunk.sizes)}")
            except PickleError as error:
                where = self.directory / chunk.file
                raise damaged(where, f"{name}, at byte {chunk.begin}: {error}") from error
            self._views[key] = view
        return self._views[key]


class SafetensorsFolder(StoredFolder):
    """Folder of safetensors files: of Hugging Face, or of torch's storage for it, shard by shard or whole.

    Args:
        directory: the folder.
    """

    kind = "safetensors"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, read_safetensors(directory), {})

    def _layout(self, name: str, chunk: StoredChunk) -> tuple[int, tuple[int, ...]]:
        strides = [1]
        for size in chunk.sizes[:0:-1]:
            strides.insert(0, strides[0] * size)
        return chunk.begin, tuple(strides[:len(chunk.sizes)])
