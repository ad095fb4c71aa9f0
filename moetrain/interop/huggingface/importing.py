"""Import of a folder of Hugging Face's layout: its tensors become a checkpoint of ours, layer by layer.

    with open_folder(directory) as folder:
        account = account_for(folder, family, config)          # every tensor, before anything is written
        import_folder(folder, "runs/mine", family=family, config=config)

Every tensor of the folder is mapped, or a duplicate of one that is, or kept as it is for the way back; every
tensor of the model comes from the folder; and shapes agree. Otherwise nothing is written. In memory is one
group of tensors that are converted together: an expert, or a layer's experts where they are one tensor.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moetrain.checkpoint import disk
from moetrain.config.schema import Config
from moetrain.errors import CheckpointError
from moetrain.interop.huggingface.families.base import Family
from moetrain.interop.huggingface.folder import HuggingFaceFolder
from moetrain.interop.huggingface.folder_writer import FolderWriter
from moetrain.interop.huggingface.tensor_map import TensorMap
from moetrain.model.build import weights_on_meta
from moetrain.transform.writer import write_run

# Folder of a run with the tensors that have no counterpart, as they were.
PRESERVED = Path("huggingface") / "preserved"


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


def account_for(folder: HuggingFaceFolder, family: Family, config: Config) -> ImportAccount:
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


def import_folder(folder: HuggingFaceFolder, out: str | Path, *, family: Family, config: Config,
                  facts: Mapping[str, Any] | None = None,
                  advance: Callable[[int], None] = lambda count: None) -> Path:
    """Write the tensors of a folder as a run that training has not begun.

    Args:
        folder: the folder.
        out: directory of the run, which must hold none.
        family: its family.
        config: config of the run, with `model.vocab_size`.
        facts: of the manifest.
        advance: is told the bytes that were read.

    Returns:
        Directory of the checkpoint. Errors as of `account_for` and `write_run`.
    """
    account = account_for(folder, family, config)
    for name, of in account.duplicates.items():
        if not torch.equal(folder[name], folder[of]):
            raise CheckpointError(
                38, f"{name} differs from {of}", where=str(folder.directory),
                why="config.json says that they are one matrix (tie_word_embeddings)",
                next="tie_word_embeddings: false in config.json, if the model has two")
    preserved = Path(out) / PRESERVED
    try:
        _keep(folder, account.preserved, preserved)
        return write_run(out, config, _converted(folder, account.maps, advance),
                         vocab_size=_vocabulary(config), facts=dict(facts or {}))
    except BaseException:
        disk.remove_tree(preserved)
        raise


def _converted(folder: HuggingFaceFolder, maps: list[TensorMap],
               advance: Callable[[int], None]) -> Iterator[tuple[str, Tensor]]:
    for group in maps:
        theirs = tuple(folder[name] for name in group.theirs)
        yield from zip(group.ours, group.to_ours(theirs), strict=True)
        advance(sum(tensor.nbytes for tensor in theirs))


def _keep(folder: HuggingFaceFolder, names: list[str], out: Path) -> None:
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
