"""A DCP folder as a model of a public family: what the importer reads, under the family's own names.

    with open_dcp("checkpoints/step-1000", config) as folder:     # what open_folder of a public model offers
        folder.config, folder.names, folder.shape(name), folder[name]

Programs save the state of a model of transformers under a key of their own (`model.`, `state.app.model.`),
wrapped by torch.compile, FSDP or checkpointing (`_orig_mod.`). Both are taken off. Tensors outside of that
key, such as moments of an optimizer, are no part of the model. Family and sizes stand in a `config.json`,
which lies in the folder or is given. A folder whose tensors have other names is refused, with a list of them.
"""

import re
from collections.abc import Iterator, Mapping
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moetrain.errors import CheckpointError
from moetrain.files import read_json, reason
from moetrain.interop.dcp.folder import DcpFolder
from moetrain.interop.dcp.records import ELEMENT_BYTES, damaged
from moetrain.interop.expert_names import in_order
from moetrain.parallel.state_shards import DTYPES

CONFIG = "config.json"
_EMBEDDING = "model.embed_tokens.weight"  # of every family
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_SHOWN = 12
# numpy has no bfloat16 and float8: elements go through integers of their width, which torch knows all of.
_INTEGERS = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}


def open_dcp(directory: str | Path, config: Mapping[str, Any] | None = None) -> "DcpModel":
    """Open a DCP folder as a public model; raises CheckpointError where it is damaged, or no such model.

    Args:
        directory: the folder.
        config: content of the `config.json`; None: that of the folder.
    """
    return DcpModel(Path(directory), config)


class DcpModel:
    """Model in a DCP folder, open for reading; a context manager that iterates over (name, tensor).

    Args:
        directory: the folder.
        config: content of the `config.json`; None: that of the folder.

    Attributes:
        config: the `config.json`.
        names: names of the model's tensors, as transformers has them, layer by layer.
        dtypes: dtypes in which they are stored, as safetensors spells them, by name.
    """

    def __init__(self, directory: Path, config: Mapping[str, Any] | None = None) -> None:
        self.directory = directory
        self._folder = DcpFolder(directory)
        try:
            self.config = dict(_config_of(self._folder) if config is None else config)
            self._stored = _names(self._folder)
        except BaseException:
            self.close()
            raise
        self.names = sorted(self._stored, key=in_order)
        self.dtypes = {name: self._folder.dtype(stored) for name, stored in self._stored.items()}

    def __enter__(self) -> "DcpModel":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files."""
        self._folder.close()

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.names:
            yield name, self[name]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors by name."""
        return {name: self.shape(name) for name in self.names}

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(prod(self.shape(name)) * ELEMENT_BYTES[self.dtype(name)] for name in self.names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it; KeyError where there is none of that name."""
        return self._folder.shape(self._stored[name])

    def dtype(self, name: str) -> str:
        """Dtype of a tensor, in safetensors' spelling."""
        return self._folder.dtype(self._stored[name])

    def __getitem__(self, name: str) -> Tensor:
        """Read a tensor; KeyError where there is none of that name."""
        return self.rows(name)

    def rows(self, name: str, first: int = 0, count: int | None = None) -> Tensor:
        """Read `count` rows of a tensor from `first` on; all of it where `count` is None."""
        dtype = self.dtype(name)
        words = self._folder.read(self._stored[name], first, count)
        return torch.from_numpy(words.view(_INTEGERS[ELEMENT_BYTES[dtype]])).view(DTYPES[dtype])

    @property
    def raw_names(self) -> list[str]:
        """Names of the tensors as they are stored: the same, since DCP does not quantize."""
        return self.names

    def raw_kind(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Dtype and shape of a tensor as it is stored."""
        return self.dtype(name), self.shape(name)

    def raw(self, name: str, first: int = 0, count: int | None = None) -> Tensor:
        """Read a tensor as it is stored."""
        return self.rows(name, first, count)


def _config_of(folder: DcpFolder) -> Mapping[str, Any]:
    path = folder.directory / CONFIG
    try:
        config = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            46, f"a DCP folder has no {CONFIG} that can be read", where=str(path), why=reason(error),
            next=f"config=<the model's {CONFIG}>, or copy it into the folder, which holds "
                 f"{_there(folder)}") from error
    return config if isinstance(config, dict) else {}


def _names(folder: DcpFolder) -> dict[str, str]:
    """Names in the folder of the model's tensors, by their names in transformers."""
    bare: dict[str, str] = {}
    for stored in folder.tensors:
        name = _WRAPPERS.sub("", stored)
        if name in bare:
            raise CheckpointError(
                47, f"{name} is in the folder twice", where=str(folder.directory),
                why=f"as {bare[name]} and as {stored}", next="save the model once")
        bare[name] = stored
    keys = [name.removesuffix(_EMBEDDING) for name in bare if name.endswith(_EMBEDDING)]
    keys = [key for key in keys if not key or key.endswith(".")]
    if len(keys) != 1:
        raise CheckpointError(
            48, "the tensors of a DCP folder do not have the names of a public family",
            where=str(folder.directory),
            why=f"{len(keys) or 'no'} tensors end in {_EMBEDDING}; the folder holds {_there(folder)}",
            next="save the state_dict of one model of transformers, or of one with its names")
    model = {name.removeprefix(keys[0]): stored for name, stored in bare.items() if name.startswith(keys[0])}
    for stored in model.values():
        if folder.dtype(stored) not in DTYPES:
            raise damaged(folder.directory, f"{stored} is {folder.dtype(stored)}, which no model here has")
    return model


def _there(folder: DcpFolder) -> str:
    """What is in a folder, in one sentence."""
    names = sorted(folder.tensors, key=in_order)
    shown = ", ".join(f"{name} {list(folder.shape(name))}" for name in islice(names, _SHOWN))
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown or "no tensors"
