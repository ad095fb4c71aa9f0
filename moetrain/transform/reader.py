"""Reading of a checkpoint's weights tensor by tensor, in the order of the layers, without building the model.

No more than one tensor is in memory. Every byte is compared with its checksum as it is read.
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from moetrain.checkpoint.digest import WEIGHTS, weights_digest
from moetrain.checkpoint.manifest import damaged, read_manifest
from moetrain.checkpoint.payload import Payload
from moetrain.checkpoint.records import ByteRange, row_bytes
from moetrain.checkpoint.verify import check_files
from moetrain.config.schema import Config
from moetrain.files import reason
from moetrain.parallel.state_shards import DTYPES
from moetrain.runs.completion import config_of, trained_config
from moetrain.runs.named_checkpoint import named_checkpoints

_LAYER = re.compile(r"(?:model|buffer)\.layers\.(\d+)\.")
_NUMBER = re.compile(r"\d+")


def open_weights(source: str | Path) -> "WeightsReader":
    """Open the weights of a run (name or directory; its newest checkpoint) or of a checkpoint (directory).

    Raises CheckpointError where a file is missing or damaged, ConfigError where there is no such run.
    """
    return WeightsReader(named_checkpoints(str(source))[-1])


class WeightsReader:
    """Weights of a checkpoint, open for reading: a context manager that iterates over (name, tensor).

    Args:
        directory: of the checkpoint.

    Attributes:
        manifest: what the checkpoint holds.
        names: names of its weights: embedding, layer by layer, then norm and head.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.manifest = directory, read_manifest(directory)
        try:
            check_files(directory, self.manifest)
        except OSError as error:
            raise damaged(directory, f"the directory cannot be read: {reason(error)}") from error
        self.names = sorted((name for name in self.manifest.names() if name.startswith(WEIGHTS)), key=_order)
        self._files: dict[str, Payload] = {}
        self._stack = ExitStack()

    @property
    def config(self) -> Config:
        """Config that the weights were trained with; `data.cache` names the run's own prepared data."""
        run = self.directory.parents[1]
        config = (trained_config(run, self.directory) if self.directory.parent.name == "checkpoints"
                  else config_of(self.manifest, self.directory))
        prepared = run / "data"
        if config.data.cache is None and prepared.is_dir():
            config = replace(config, data=replace(config.data, cache=str(prepared.absolute())))
        return config

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.shape("model.embed")[0]

    @property
    def digest(self) -> str:
        """Digest of the weights (checkpoint/digest.py)."""
        return weights_digest(self.manifest)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it; KeyError where there is none of that name."""
        entry = self.manifest.entry(name)
        if entry is None:
            raise KeyError(name)
        return entry.shape

    def __contains__(self, name: str) -> bool:
        return self.manifest.entry(name) is not None

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.names:
            yield name, self[name]

    def __getitem__(self, name: str) -> Tensor:
        """Read a tensor, in the dtype in which it is stored; KeyError where there is none of that name."""
        entry = self.manifest.entry(name)
        if entry is None:
            raise KeyError(name)
        tensor, width, begin = torch.empty(entry.shape, dtype=DTYPES[entry.dtype]), row_bytes(entry), 0
        if not tensor.numel():
            return tensor
        content = memoryview(tensor.view(-1).view(torch.uint8).numpy())
        for chunk in entry.chunks:
            part = ByteRange(chunk.begin, chunk.rows * width, name, entry.dtype, entry.shape, chunk.crcs)
            self._file(chunk.file).fill(part, self.manifest.block, content[begin:begin + part.length])
            begin += part.length
        return tensor

    def __enter__(self) -> "WeightsReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()
        self._stack.close()

    def _file(self, name: str) -> Payload:
        """Open a payload file once, and check that its header lists the tensors of the manifest."""
        if name not in self._files:
            payload = self._stack.enter_context(
                Payload(self.directory / name, self.manifest.files[name]))
            payload.check_keys(self.manifest.parts()[name], self.manifest.values["step"])
            self._files[name] = payload
        return self._files[name]


def _order(name: str) -> tuple[int, list[int | str]]:
    """Sort by layer; numbers in names count as numbers. The embedding comes first, norm and head last."""
    found = _LAYER.match(name)
    place = int(found[1]) if found else -1 if name == "model.embed" else 1 << 62
    # Expert ids are compared by length first, so that 10 comes after 9.
    text = _NUMBER.sub(lambda number: f"{len(number[0]):04d}{number[0]}", name)
    return place, [text]
