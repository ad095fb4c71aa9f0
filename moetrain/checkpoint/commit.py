"""Commit of a checkpoint: files that all ranks have written become one that counts, and old ones are removed.

    step-00000100.tmp-3/rank-0000.safetensors, index-0000.json, ...    every rank, fsync
    step-00000100.tmp-3/manifest.json                                  rank 0, from the indexes; fsync, and
                                                                       fsync of the directory
    step-00000100/                                                     rename, fsync of the parent
    the oldest                                                         renamed to .tmp, then removed

Before the rename there is no new checkpoint, after it there is a complete one; at no time are there fewer
than before. No pointer names the newest checkpoint: the names of the directories order them, and always match
what is there. This file imports no torch.
"""

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from moetrain.checkpoint import disk
from moetrain.checkpoint.manifest import NAME, checkpoints_of, is_step, read_checked, read_manifest
from moetrain.checkpoint.payload import TensorRows, payload_name, write_payload
from moetrain.checkpoint.records import (
    Chunk,
    ExpertTable,
    Manifest,
    PayloadFile,
    TensorEntry,
    row_count,
    split_expert,
    with_checksum,
)
from moetrain.checkpoint.tensor_names import NAMING
from moetrain.checkpoint.verify import check_files, is_sound, problems

log = logging.getLogger(__name__)


def write_rank(directory: Path, rank: int, items: list[TensorRows], step: int) -> None:
    """Write the payload of a rank, if it has one, and its index.

    Raises OSError when it cannot be written, and leaves nothing behind then.

    Args:
        directory: temporary directory of the save.
        rank: this rank.
        items: rows of tensors that it writes.
        step: step of the checkpoint.
    """
    payload, index = directory / payload_name(rank), _index(directory, rank)
    file: PayloadFile | None = None
    rows: list[list[Any]] = []
    try:
        disk.make_directory(directory)
        if items:
            file, rows = write_payload(payload, items, step)
        with disk.new_file(index) as append:
            append(with_checksum({"file": file, "rows": rows}))
    except OSError:
        for path in (payload, index):
            with suppress(OSError):
                disk.remove(path)
        raise


def commit(temporary: Path, final: Path, *, ranks: int, facts: dict[str, Any], values: dict[str, Any],
           keep: int | None = None) -> None:
    """Make a checkpoint of what all ranks have written; rank 0 calls it.

    Raises OSError or CheckpointError when that fails, and has changed nothing else then.

    Args:
        temporary: directory of the save.
        final: directory of the checkpoint.
        ranks: number of ranks that have written.
        facts: how the checkpoint was made, for the manifest.
        values: state that is no tensor, for the manifest.
        keep: number of checkpoints to keep; None keeps all.
    """
    manifest = merge({rank: read_checked(_index(temporary, rank)) for rank in range(ranks)}, facts, values)
    with disk.new_file(temporary / NAME) as append:
        append(manifest.encode())
    check_written(temporary, ranks)
    for rank in range(ranks):
        disk.remove(_index(temporary, rank))
    disk.sync_directory(temporary)
    if os.path.lexists(final) and not _make_way(final):
        disk.remove_tree(temporary)
    else:
        disk.rename(temporary, final)
        disk.sync_directory(final.parent)
    try:
        remove_old(final.parents[1], keep)
    except OSError as error:  # the new checkpoint exists, so the save has succeeded
        log.warning("old checkpoints could not be removed: %s", error)


def merge(indexes: dict[int, Any], facts: dict[str, Any], values: dict[str, Any]) -> Manifest:
    """Merge the indexes of all ranks into a manifest.

    Args:
        indexes: content of the index file of each rank.
        facts: how the checkpoint was made.
        values: state that is no tensor.
    """
    manifest = Manifest(facts={**facts, "names": NAMING}, values=values)
    experts: dict[str, dict[int, tuple[str, tuple[int, ...], list[int]]]] = {}
    found: dict[str, tuple[str, tuple[int, ...], list[Chunk]]] = {}
    for rank, index in indexes.items():
        number, name_of_file = len(manifest.files), payload_name(rank)
        if index["file"] is not None:
            manifest.files[name_of_file] = PayloadFile(*index["file"])
        for name, dtype, shape, begin, first, rows, *crcs in index["rows"]:
            kind = split_expert(name)
            if kind and rows == row_count(shape) and kind[1] not in experts.get(kind[0], ()):
                experts.setdefault(kind[0], {})[kind[1]] = (dtype, tuple(shape), [number, begin, *crcs])
                continue
            entry = found.setdefault(name, (dtype, tuple(shape), []))
            assert entry[:2] == (dtype, tuple(shape)), (
                f"{name} is {dtype} {shape} on rank {rank}, {entry[:2]} elsewhere")
            entry[2].append(Chunk(name_of_file, begin, first, rows, tuple(crcs)))
    files = list(manifest.files)
    for pattern, by_id in experts.items():
        kinds = {(dtype, shape) for dtype, shape, _ in by_id.values()}
        if len(kinds) == 1 and by_id.keys() == set(range(len(by_id))):
            manifest.experts[pattern] = ExpertTable(
                *kinds.pop(), [by_id[expert][2] for expert in range(len(by_id))])
            continue
        # Experts of different shapes, or only some of a layer's, are recorded one by one.
        for expert, (dtype, shape, (number, begin, *crcs)) in by_id.items():
            chunks = found.setdefault(pattern.replace("*", str(expert)), (dtype, shape, []))[2]
            chunks.append(Chunk(files[number], begin, 0, row_count(shape), tuple(crcs)))
    manifest.tensors = {name: TensorEntry(dtype, shape, tuple(sorted(chunks, key=lambda chunk: chunk.first)))
                        for name, (dtype, shape, chunks) in sorted(found.items())}
    return manifest


def check_written(directory: Path, ranks: int) -> None:
    """Read the new checkpoint back with the checks of a reader, before it is renamed into place."""
    hidden = {_index(directory, rank).name for rank in range(ranks)}
    manifest = read_manifest(directory)
    check_files(directory, manifest, but=hidden)


def remove_old(run_dir: Path, keep: int | None) -> list[Path]:
    """Remove checkpoints older than the newest `keep` sound ones, and damaged ones that were set aside.

    With `keep` None nothing is removed. Directories of other names are not touched. Returns what was removed.
    """
    sound = [path for path in reversed(checkpoints_of(run_dir)) if is_sound(path)] if keep else []
    if not keep or len(sound) < keep:
        return []
    oldest = sound[keep - 1]
    old = [path for path in oldest.parent.glob("step-*")
           if is_step(path.name.removesuffix(".damaged")) and path.name[:13] < oldest.name]
    for path in sorted(old):
        # Renamed before it is removed, so that no checkpoint ever lacks some of its files.
        grave = path.with_name(f"{path.name}.tmp-0")
        disk.remove_tree(grave)
        disk.rename(path, grave)
        disk.remove_tree(grave)
    return old


def remove_leftovers(run_dir: Path) -> None:
    """Remove what killed saves left behind. No save may be under way in this directory."""
    for path in (run_dir / "checkpoints").glob("step-*.tmp*"):
        with suppress(OSError):
            disk.remove_tree(path)


def set_aside(path: Path) -> None:
    """Rename a damaged checkpoint to <name>.damaged, so that it can be examined."""
    aside = path.with_name(f"{path.name}.damaged")
    disk.remove_tree(aside)
    disk.rename(path, aside)


def _make_way(final: Path) -> bool:
    """Set a damaged checkpoint of this step aside. Returns False where there is a sound one already."""
    if next(problems(final), None) is None:
        log.info("%s is there already", final)
        return False
    set_aside(final)
    return True


def _index(directory: Path, rank: int) -> Path:
    return directory / f"index-{rank:04d}.json"
