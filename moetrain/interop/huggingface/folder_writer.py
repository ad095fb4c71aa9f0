"""Writing of a folder in Hugging Face's layout: shards of safetensors, their index, and then all at once.

    with FolderWriter("mine", shard_bytes=5 * 10**9) as writer:
        writer.begin_shards({"model.embed_tokens.weight": ("BF16", (50304, 2048)), ...})
        writer.add("model.embed_tokens.weight", tensor)                        # in any order, each once
        writer.end_shards()
        (writer.folder / "config.json").write_text(...)                        # whatever else belongs to it

The folder is written beside its place and renamed when the block ends: it is whole, or not there. Names and
shapes are known before, so each shard has its final name and header from the beginning, and every tensor goes
to its place in the file at once; no more than one is in memory. Nothing is overwritten.
"""

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moetrain.checkpoint.payload import header
from moetrain.checkpoint.records import ITEM_BYTES, ByteRange
from moetrain.files import create
from moetrain.interop.huggingface.folder import INDEX, SINGLE
from moetrain.parallel.state_shards import DTYPES
from moetrain.transform.destination import disk_errors, new_directory, refuse_existing

SHARD_BYTES = 5 * 10**9
# Dtype, as safetensors spells it, and shape.
Kind = tuple[str, tuple[int, ...]]


class _Place(NamedTuple):
    """Where a tensor is written."""

    file: str
    begin: int
    kind: Kind


class FolderWriter:
    """Writer of a folder; a context manager.

    Args:
        out: the folder, which must not exist.
        shard_bytes: bytes of a shard at most; a larger tensor has one of its own.

    Attributes:
        folder: where it is written until the block ends.
        total_bytes: bytes of all tensors.
    """

    def __init__(self, out: str | Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.out, self.shard_bytes, self.total_bytes = Path(out), shard_bytes, 0
        refuse_existing(self.out)
        self._places: dict[str, _Place] = {}
        self._left: set[str] = set()
        self._open: dict[str, int] = {}

    def __enter__(self) -> "FolderWriter":
        with ExitStack() as stack:
            self.folder = stack.enter_context(new_directory(self.out))
            stack.callback(self._close)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        assert exception[0] is not None or not self._open, "end_shards comes before the end of the block"
        self._stack.__exit__(*exception)

    def begin_shards(self, tensors: Mapping[str, Kind]) -> None:
        """Plan all shards, and write their headers and the index.

        Args:
            tensors: dtype and shape of every tensor by name, in the order in which they lie.
        """
        shards = self._planned(tensors)
        names = [SINGLE] if len(shards) == 1 else [
            f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        for file, shard in zip(names, shards):
            self._begin_shard(file, {name: tensors[name] for name in shard})
        self._left = set(tensors)
        if len(shards) > 1:
            index = {"metadata": {"total_size": self.total_bytes},
                     "weight_map": {name: self._places[name].file for name in sorted(tensors)}}
            self.write(INDEX, json.dumps(index, indent=2) + "\n")

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor, in the dtype that was planned; each once, in any order."""
        place = self._places[name]
        dtype, shape = place.kind
        assert name in self._left and tuple(tensor.shape) == shape, (name, tuple(tensor.shape), shape)
        self._left.remove(name)
        values = tensor.detach().to(device="cpu", dtype=DTYPES[dtype]).contiguous()
        if values.numel():
            self._tried(_write_at, self._open[place.file],
                        memoryview(values.view(-1).view(torch.uint8).numpy()), place.begin)

    def end_shards(self) -> None:
        """Bring the shards to the disk. Every tensor has been added."""
        assert not self._left, f"not added: {sorted(self._left)[:3]}"
        for file in list(self._open):
            descriptor = self._open.pop(file)
            try:
                self._tried(os.fsync, descriptor)
            finally:
                os.close(descriptor)

    def write(self, file: str, content: str | bytes) -> None:
        """Write a file of the folder; text as UTF-8."""
        self._tried(_write_new, self.folder / file, content.encode() if isinstance(content, str) else content)

    def _planned(self, tensors: Mapping[str, Kind]) -> list[list[str]]:
        """Divide tensors into shards, in their order."""
        shards, filled = list[list[str]](), 0
        for name, kind in tensors.items():
            size = _size(kind)
            if not shards or filled + size > self.shard_bytes and filled:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += size
            self.total_bytes += size
        return shards

    def _begin_shard(self, file: str, tensors: Mapping[str, Kind]) -> None:
        # Those with the largest elements first, so that every tensor lies aligned.
        ordered = sorted(tensors, key=lambda name: -ITEM_BYTES[tensors[name][0]])
        parts = [ByteRange(0, _size(tensors[name]), name, *tensors[name], ()) for name in ordered]
        head = header(parts, {"format": "pt"})
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        descriptor = self._open[file] = self._tried(os.open, self.folder / file, flags, 0o644)
        self._tried(_write_at, descriptor, memoryview(head), 0)
        begin = len(head)
        for name in ordered:
            self._places[name] = _Place(file, begin, tensors[name])
            begin += _size(tensors[name])

    def _tried(self, action, *arguments):
        """Do something to the disk; an OSError becomes a DiskError that names the folder."""
        with disk_errors(self.out):
            return action(*arguments)

    def _close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open = {}


def _size(kind: Kind) -> int:
    return prod(kind[1]) * ITEM_BYTES[kind[0]]


def _write_new(path: Path, content: bytes) -> None:
    with create(path) as file:
        file.write(content)


def _write_at(descriptor: int, content: memoryview, begin: int) -> None:
    while content:
        done = os.pwrite(descriptor, content, begin)
        content, begin = content[done:], begin + done
