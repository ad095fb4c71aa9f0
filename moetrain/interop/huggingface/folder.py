"""A folder of Hugging Face's layout, read tensor by tensor: config.json, and shards of safetensors.

    with open_folder("Qwen3-30B-A3B") as folder:
        folder.config["model_type"], folder.shape("lm_head.weight"), folder["lm_head.weight"]

Everything is checked when it is opened: names, shapes and sizes of all tensors, and that index and shards say
the same. Nothing of the folder is run: pickles are refused, and so are folders that need code of their own.
Quantized weights look like what they stand for (dequantize.py); the tensors of their scales are not listed.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from moetrain.errors import CheckpointError
from moetrain.files import lies_inside, parse_json, read_bytes, reason
from moetrain.interop.huggingface.dequantize import find_quantized
from moetrain.interop.huggingface.shard_file import ShardFile, StoredTensor, damaged

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
_LARGEST = {CONFIG: 10 << 20, INDEX: 200 << 20}              # bytes
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def open_folder(directory: str | Path) -> "HuggingFaceFolder":
    """Open a folder; raises CheckpointError where it is not whole, or needs what is not run here."""
    return HuggingFaceFolder(Path(directory))


class HuggingFaceFolder:
    """Folder of a public model, open for reading; a context manager that iterates over (name, tensor).

    Args:
        directory: the folder.
        config: its config.json, where none lies in it.

    Attributes:
        config: its config.json.
        names: names of the model's tensors, in the order of the shards and of their bytes.
        raw_names: names of all tensors as they are stored, those of scales included.
    """

    def __init__(self, directory: Path, config: dict[str, Any] | None = None) -> None:
        self.directory = directory
        self.config = self._read_config() if config is None else config
        self._shards: dict[str, ShardFile] = {}
        try:
            self._home = self._open_shards()
            stored = {name: shard.tensors[name] for name, shard in self._home.items()}
            self._quantized, scales = find_quantized(directory, self.config, stored)
        except BaseException:
            self.close()
            raise
        self.raw_names = list(stored)
        self.names = [name for name in dict.fromkeys([*stored, *self._quantized]) if name not in scales]

    def __enter__(self) -> "HuggingFaceFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all shards."""
        for shard in self._shards.values():
            shard.close()
        self._shards = {}

    def __contains__(self, name: str) -> bool:
        return name in self._quantized or name in self._home

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.names:
            yield name, self[name]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors by name."""
        return {name: self.shape(name) for name in self.names}

    @property
    def size(self) -> int:
        """Bytes of all tensors, as they are stored."""
        return sum(stored.size for shard in self._shards.values() for stored in shard.tensors.values())

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it; KeyError where there is none of that name."""
        if name in self._quantized:
            return self._quantized[name].shape
        return self._stored(name).shape

    def dtype(self, name: str) -> str:
        """Dtype of a tensor as `[name]` returns it, in safetensors' spelling."""
        return "F32" if name in self._quantized else self._stored(name).dtype

    def __getitem__(self, name: str) -> Tensor:
        """Read a tensor; KeyError where there is none of that name."""
        return self.rows(name)

    def rows(self, name: str, first: int = 0, count: int | None = None) -> Tensor:
        """Read `count` rows of a tensor from `first` on; all of it where `count` is None."""
        if name in self._quantized:
            return self._quantized[name].read(self.raw, first, count)
        return self.raw(name, first, count)

    def raw(self, name: str, first: int = 0, count: int | None = None) -> Tensor:
        """Read a tensor as it is stored, quantized or not."""
        self._stored(name)
        return self._home[name].read(name, first, count)

    def raw_kind(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Dtype and shape of a tensor as it is stored."""
        stored = self._stored(name)
        return stored.dtype, stored.shape

    def _stored(self, name: str) -> StoredTensor:
        if name not in self._home:
            raise KeyError(name)
        return self._home[name].tensors[name]

    def _read_config(self) -> dict[str, Any]:
        config = _object(self.directory, CONFIG)
        if config is None:
            raise CheckpointError(
                24, f"the folder has no {CONFIG}", where=str(self.directory),
                why="family and sizes of the model stand there" if self.directory.is_dir() else
                "there is no such folder",
                next="the folder that holds config.json and *.safetensors of one model")
        if config.get("auto_map"):
            raise CheckpointError(
                25, "the model needs code of its own", where=f"{self.directory / CONFIG}, auto_map",
                why="code of a folder is not run (trust_remote_code)",
                next="a folder of a model that transformers has built in; its config.json names no auto_map")
        return config

    def _open_shards(self) -> dict[str, ShardFile]:
        """Open all shards; returns that of each tensor by name."""
        index = _object(self.directory, INDEX)
        if index is None:
            return self._open_single()
        home = index.get("weight_map")
        if not isinstance(home, dict) or not all(isinstance(file, str) for file in home.values()):
            raise damaged(self.directory / INDEX, "weight_map is no list of tensors with their files")
        found: dict[str, ShardFile] = {}
        for file in dict.fromkeys(home.values()):
            shard = self._shards[file] = self._open_shard(file)
            for name in shard.tensors:
                if name in found:
                    raise damaged(shard.path, f"{name} is in {found[name].path.name}, too")
                if home.get(name) != file:
                    raise damaged(shard.path, f"it holds {name}, and the index has that " + (
                        f"in {home[name]}" if name in home else "nowhere"))
                found[name] = shard
        if lacking := [name for name in home if name not in found]:
            raise damaged(self.directory / home[lacking[0]],
                          f"{lacking[0]} is not in it, where the index has it"
                          + (f"; and {len(lacking) - 1} more" if len(lacking) > 1 else ""))
        return found

    def _open_shard(self, file: str) -> ShardFile:
        _refuse_outside(self.directory, file)
        return ShardFile(self.directory / file)

    def _open_single(self) -> dict[str, ShardFile]:
        if (self.directory / SINGLE).exists():
            shard = self._shards[SINGLE] = self._open_shard(SINGLE)
            return dict.fromkeys(shard.tensors, shard)
        if shards := sorted(self.directory.glob("*.safetensors")):
            raise CheckpointError(
                27, f"the folder has {len(shards)} shards and no index", where=str(self.directory / INDEX),
                why="the index says which shards belong to the model", next=f"fetch {INDEX}, too")
        pickles = sorted(path.name for pattern in _PICKLES for path in self.directory.glob(pattern))
        if pickles:
            raise CheckpointError(
                28, f"the weights are pickles ({pickles[0]})", where=str(self.directory),
                why="a pickle runs whatever code its writer has put into it, so it is not opened",
                next="in a program that trusts it: AutoModelForCausalLM.from_pretrained(DIR)"
                     ".save_pretrained(NEW, safe_serialization=True)")
        raise CheckpointError(
            24, "the folder has no weights", where=str(self.directory),
            why=f"neither {SINGLE} nor {INDEX} is there", next="the folder that holds *.safetensors, too")


def _refuse_outside(directory: Path, file: str) -> None:
    """Raise CheckpointError where a name, or a link, leads out of the folder."""
    if not lies_inside(directory, file):
        place = "no name of a file" if "\0" in file else os.path.realpath(directory / file)
        raise CheckpointError(
            26, f"{file} lies outside the folder", where=str(directory), why=f"it is {place}",
            next="a folder whose index names files that lie beside it; links to a cache's blobs are followed")


def _object(directory: Path, file: str) -> dict[str, Any] | None:
    """Read a JSON object of the folder; None where there is no such file."""
    path = directory / file
    if not path.exists() and not path.is_symlink():
        return None
    _refuse_outside(directory, file)
    try:
        found = parse_json(read_bytes(path, limit=_LARGEST[file]))
    except (OSError, ValueError) as error:
        raise damaged(path, reason(error)) from error
    if not isinstance(found, dict):
        raise damaged(path, "it is no JSON object")
    return found
