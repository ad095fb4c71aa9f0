"""Import of a folder of Hugging Face's layout: its tensors become a checkpoint of ours, layer by layer.

    with open_folder(directory) as folder:
        account = account_for(folder, family, config)          # every tensor, before anything is written
        import_folder(folder, "runs/mine", family=family, config=config)

Every tensor of the folder is mapped, or a duplicate of one that is, or kept as it is for the way back; every
tensor of the model comes from the folder; and shapes agree. Otherwise nothing is written. In memory is one
group of tensors that are converted together: an expert, or a layer's experts where they are one tensor.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moetrain.checkpoint.digest import named_digest
from moetrain.config.schema import Config
from moetrain.errors import CheckpointError
from moetrain.interop.dcp.as_huggingface import DcpModel
from moetrain.interop.huggingface.families.base import Family
from moetrain.interop.huggingface.folder import HuggingFaceFolder
from moetrain.interop.huggingface.folder_writer import FolderWriter
from moetrain.interop.huggingface.tensor_map import TensorMap
from moetrain.model.build import weights_on_meta
from moetrain.transform.destination import refuse_existing
from moetrain.transform.frame import Rule, transform

# Both have names, shapes, dtypes and tensors in the same way.
PublicFolder = HuggingFaceFolder | DcpModel
# Folder of a run with the tensors that have no counterpart, as they were.
PRESERVED = Path("huggingface") / "preserved"
_ROWS = 4096               # of two tensors that are compared, at a time


class ImportAccount(NamedTuple):
    """Where every tensor of a folder goes.

    Attributes:
        maps: groups of tensors that are converted together, in the order of the layers.
        duplicates: names that hold another tensor a second time.
        preserved: names, as they are stored, that are kept as they are.
    """

    maps: list[TensorMap]
    duplicates: dict[str, str]
    preserved: list[str]


def account_for(folder: PublicFolder, family: Family, config: Config) -> ImportAccount:
    """Find the place of every tensor.

    Args:
        folder: the folder.
        family: its family.
        config: config of the model, with `model.vocab_size`.

    Raises:
        CheckpointError: a tensor is missing, has no place, or has another shape; each is named.
    """
    rows = _vocabulary(config)
    shapes = {name: tuple(shard.shape) for name, shard in weights_on_meta(config, rows).items()}
    maps = [group for layer in family.tensor_maps(config, rows, family.spelling(folder.shapes))
            for group in layer]
    wanted = {name: shape for group in maps for name, shape in group.shapes_of_theirs(shapes).items()}
    assert {name for group in maps for name in group.ours} == shapes.keys(), "the table is not complete"
    if missing := [name for name in wanted if name not in folder]:
        raise CheckpointError(
            40, f"the folder lacks {len(missing)} of the model's {len(wanted)} tensors",
            where=str(folder.directory), why=f"{_listed(missing)}: not there",
            next="fetch all shards; or correct config.json, if the model is a smaller one")
    if odd := [name for name in wanted if folder.shape(name) != wanted[name]]:
        raise CheckpointError(
            37, f"{len(odd)} tensors of the folder have another shape than config.json says",
            where=str(folder.directory),
            why=f"{odd[0]} is {list(folder.shape(odd[0]))}, and its config.json says {list(wanted[odd[0]])}",
            next="the config.json that belongs to these weights")
    preserved = [name for name in folder.raw_names if family.preserved(name, config)]
    duplicates = {name: of for name, of in family.duplicates(config).items()
                  if name in folder and name not in wanted}
    left = [name for name in folder.names if name not in wanted.keys() | duplicates.keys() | set(preserved)]
    if left:
        raise CheckpointError(
            40, f"{len(left)} tensors of the folder have no place in the model", where=str(folder.directory),
            why=f"{_listed(left)}: {family.model_type} with this config.json does not have them",
            next="the config.json that belongs to these weights, such as with all experts and layers")
    return ImportAccount(maps, duplicates, preserved)


def import_folder(folder: PublicFolder, out: str | Path, *, family: Family, config: Config,
                  facts: Mapping[str, Any] | None = None,
                  files: Callable[[Path], None] = lambda unfinished: None,
                  advance: Callable[[int], None] = lambda count: None) -> Path:
    """Write the tensors of a folder as a run that training has not begun, whole or not at all.

    Args:
        folder: the folder.
        out: directory of the run; nothing is there yet.
        family: its family.
        config: config of the run, with `model.vocab_size`.
        facts: of the manifest.
        files: writes what else belongs to the run, before it is at its place.
        advance: is told the bytes that were read.

    Returns:
        Directory of the checkpoint. Errors as of `account_for` and `transform`.
    """
    refuse_existing(Path(out).absolute(), str(out))
    account = account_for(folder, family, config)
    for name, of in account.duplicates.items():
        _refuse_difference(folder, name, of)
    source = _ReadOnce(folder)

    def others(unfinished: Path) -> None:
        _keep(folder, account.preserved, unfinished / PRESERVED)
        files(unfinished)

    rule = Rule("import", {"family": family.model_type}, expected="exact")
    return transform(out, rule, [source], config, _converted(source, account.maps, advance),
                     vocab_size=_vocabulary(config), facts=facts, files=others).checkpoint


class _ReadOnce:
    """A folder whose tensors are read one by one, with the digest of what was read.

    The digest is that of checkpoint/digest.py: names, dtypes, shapes, and a CRC-32 of each tensor.
    """

    def __init__(self, folder: PublicFolder) -> None:
        self.folder, self.directory = folder, folder.directory
        self._read: dict[str, int] = {}

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.folder[name]
        values = tensor.contiguous().reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b""
        self._read[name] = zlib.crc32(memoryview(values))
        return tensor

    @property
    def digest(self) -> str:
        """Digest of the tensors that were read, as 64 hexadecimal digits."""
        return named_digest((name, self.folder.dtype(name), self.folder.shape(name), crc)
                            for name, crc in sorted(self._read.items()))


def _converted(source: _ReadOnce, maps: list[TensorMap],
               advance: Callable[[int], None]) -> Iterator[tuple[str, Tensor]]:
    for group in maps:
        theirs = tuple(source[name] for name in group.theirs)
        size = sum(tensor.nbytes for tensor in theirs)
        ours = group.to_ours(theirs)
        del theirs
        yield from zip(group.ours, ours, strict=True)
        advance(size)


def _refuse_difference(folder: PublicFolder, name: str, of: str) -> None:
    """Raise CheckpointError where a tensor is not the one that it should repeat."""
    shape = folder.shape(name)
    if shape == folder.shape(of) and all(
            torch.equal(folder.rows(name, first, min(_ROWS, shape[0] - first)),
                        folder.rows(of, first, min(_ROWS, shape[0] - first)))
            for first in range(0, shape[0], _ROWS)):
        return
    raise CheckpointError(
        38, f"{name} differs from {of}", where=str(folder.directory),
        why="config.json says that they are one matrix (tie_word_embeddings)",
        next="tie_word_embeddings: false in config.json, if the model has two")


def _keep(folder: PublicFolder, names: list[str], out: Path) -> None:
    """Write tensors of a folder as they are stored."""
    if not names:
        return
    with FolderWriter(out) as writer:
        writer.begin_shards({name: folder.raw_kind(name) for name in names})
        for name in names:
            writer.add(name, folder.raw(name))
        writer.end_shards()


def _vocabulary(config: Config) -> int:
    rows = config.model.vocab_size
    assert rows is not None, "an imported model has the vocabulary of its config.json"
    return rows


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
