"""Loading: every rank reads the tensors it holds, by name, and checks each one's checksum.

Names are global, so a checkpoint loads on any mesh. Nothing is unpickled.
"""

import math
import zlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from moetrain.model.transformer import Transformer
from moetrain.parallel.pieces import Piece
from moetrain.train.checkpoint.manifest import NAME, Entry, Manifest, damaged, read_manifest
from moetrain.train.state import TrainState, weights

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "I64": torch.int64}


def load(state: TrainState, directory: Path) -> Manifest:
    """Fill the state, optimizer included. Reads only; no collective."""
    manifest = read_manifest(directory)
    _fill(state.pieces(), manifest, directory)
    state.restore(manifest.values)
    return manifest


def load_model(model: Transformer, directory: Path) -> Manifest:
    """Fill the model's logical tensors only, for evaluation and generation."""
    manifest = read_manifest(directory)
    _fill(weights(model), manifest, directory)
    return manifest


@torch.no_grad()
def _fill(named: Iterable[Piece], manifest: Manifest, directory: Path) -> None:
    wanted = {}
    for name, _, _, view, _ in named:
        if name not in manifest.tensors:
            raise damaged(directory / NAME, f"tensor {name} is missing: the model is another one")
        wanted[name] = view
    by_file: dict[str, list[str]] = {}
    for name in wanted:
        by_file.setdefault(manifest.tensors[name].file, []).append(name)
    for file, names in by_file.items():
        path = directory / file
        if file not in manifest.files or not path.is_file():
            raise damaged(path, "the file is missing")
        if path.stat().st_size != manifest.files[file]:
            raise damaged(path, f"{path.stat().st_size} bytes long, {manifest.files[file]} when it was written")
        with path.open("rb") as stream:
            for name in names:
                wanted[name].copy_(_read(stream, path, name, manifest.tensors[name], wanted[name]))


def _read(stream, path: Path, name: str, entry: Entry, like: Tensor) -> Tensor:
    dtype = DTYPES.get(entry.dtype)
    if dtype != like.dtype or entry.shape != tuple(like.shape):
        raise damaged(path, f"{name} is {entry.dtype} {list(entry.shape)}, the model wants {like.dtype} {list(like.shape)}")
    if entry.length != math.prod(entry.shape) * dtype.itemsize:
        raise damaged(path, f"{name} has {entry.length} bytes, which its shape contradicts")
    stream.seek(entry.begin)
    content = stream.read(entry.length)
    if zlib.crc32(content) != entry.crc:
        raise damaged(path, f"{name} (bytes {entry.begin} to {entry.begin + entry.length}) does not match its checksum")
    return torch.frombuffer(bytearray(content), dtype=dtype).view(entry.shape)
