"""Export of a checkpoint's weights as a folder of Hugging Face's layout, layer by layer.

    with open_weights("runs/mine") as reader, FolderWriter("mine") as writer:
        export_weights(reader, FAMILIES["qwen3_moe"], writer, dtype=torch.bfloat16)
        writer.write("config.json", ...)

The family must hold the model exactly (`Family.refusals`). Every tensor of the checkpoint is written, each
once, and every name of the family's table. In memory is one group of tensors that are converted together.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from moetrain.checkpoint.records import ITEM_BYTES
from moetrain.errors import CheckpointError
from moetrain.interop.huggingface.families.base import Family
from moetrain.interop.huggingface.folder import HuggingFaceFolder
from moetrain.interop.huggingface.folder_writer import FolderWriter, Kind
from moetrain.parallel.state_shards import DTYPE_NAMES
from moetrain.transform.frame import Rule, write_record
from moetrain.transform.reader import WeightsReader


class ExportAccount(NamedTuple):
    """What was written.

    Attributes:
        read: names of the checkpoint's tensors.
        written: names in the folder that were made of them.
        preserved: names in the folder that came from the folder that was imported.
    """

    read: list[str]
    written: list[str]
    preserved: list[str]


def export_weights(reader: WeightsReader, family: Family, writer: FolderWriter, *,
                   dtype: torch.dtype | None = None, dtypes: Mapping[str, str] = {},
                   spelling: str | None = None, preserved: HuggingFaceFolder | None = None,
                   advance: Callable[[int], None] = lambda count: None) -> ExportAccount:
    """Write all shards and their index, and how they were made (transform.json).

    Args:
        reader: the checkpoint.
        family: family of the folder.
        writer: the folder, without tensors yet.
        dtype: dtype of the tensors; None: that of the checkpoint.
        dtypes: of single tensors, by their names in the folder, as safetensors spells them.
        spelling: of the names (`Family.spellings`); None: the one that transformers writes.
        preserved: tensors that are written as they are stored.
        advance: is told the bytes that were written.

    Raises:
        CheckpointError: the checkpoint has a tensor that the family has no name for, or lacks one.
    """
    maps = [group for layer in family.tensor_maps(reader.config, reader.vocab_size, spelling)
            for group in layer]
    mapped = {name for group in maps for name in group.ours}
    if odd := sorted(mapped.symmetric_difference(reader.names)):
        lacks = odd[0] in mapped
        raise CheckpointError(
            39, f"the checkpoint {'lacks' if lacks else 'also holds'} {odd[0]}", where=str(reader.directory),
            why=f"{family.model_type} {'has' if lacks else 'has no name for'} it"
                + (f"; and {len(odd) - 1} more" if len(odd) > 1 else ""),
            next="moetrain inspect shows what it holds")
    planned = dict[str, Kind]()
    for group in maps:
        stored = _dtype_of(reader, group.ours[0]) if dtype is None else DTYPE_NAMES[dtype]
        least = "F32" if group.float32 and stored in ("BF16", "F16") else stored
        shapes = group.shapes_of_theirs({name: reader.shape(name) for name in group.ours})
        planned |= {name: (dtypes.get(name, least), shape) for name, shape in shapes.items()}
    written = list(planned)
    if preserved is not None:
        planned |= {name: preserved.raw_kind(name) for name in preserved.raw_names}
    writer.begin_shards(planned)
    for group in maps:
        theirs = group.to_theirs(tuple(reader[name] for name in group.ours))
        for name, tensor in zip(group.theirs, theirs, strict=True):
            writer.add(name, tensor)
            advance(tensor.nbytes)
    if preserved is not None:
        for name in preserved.raw_names:
            writer.add(name, preserved.raw(name))
    writer.end_shards()
    exact = all(ITEM_BYTES[planned[name][0]] >= ITEM_BYTES[_dtype_of(reader, group.ours[0])]
                for group in maps for name in group.theirs)
    rule = Rule("export", {"family": family.model_type, "spelling": spelling},
                expected="exact" if exact else "approximate")
    write_record(writer.folder, rule.record([reader], None, None))
    return ExportAccount(list(reader.names), written, [] if preserved is None else list(preserved.raw_names))


def _dtype_of(reader: WeightsReader, name: str) -> str:
    entry = reader.manifest.entry(name)
    assert entry is not None, name
    return entry.dtype
