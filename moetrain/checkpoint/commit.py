"""From files that every rank has written to a checkpoint that counts, and which older ones may go.

    step-00000100.tmp-3/rank-0000.safetensors, index-0000.json, ...    every rank, fsync
    step-00000100.tmp-3/manifest.json                                  rank 0, from the indexes; fsync, also of the directory
    step-00000100/                                                     rename, fsync of the parent
    the oldest                                                         renamed to .tmp, then removed

Before the rename there is no new checkpoint, after it there is a complete one; at no point are there fewer than before.
There is no pointer to the newest: names say it, and cannot say something else than what is there. No torch here.
"""

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from moetrain.checkpoint import disk
from moetrain.checkpoint.manifest import NAME, checkpoints_of, is_step, read_checked, read_manifest
from moetrain.checkpoint.payload import Item, payload_name, write_payload
from moetrain.checkpoint.records import (
    Chunk,
    Entry,
    File,
    Manifest,
    Table,
    row_count,
    split_expert,
    with_checksum,
)
from moetrain.checkpoint.verify import check_files, is_sound, problems

log = logging.getLogger(__name__)


def write_rank(directory: Path, rank: int, items: list[Item], step: int) -> None:
    """This rank's payload, if it has one, and its index. OSError when it cannot be written; nothing is left of it then."""
    payload, index = directory / payload_name(rank), _index(directory, rank)
    file, rows = None, []
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
    """Make a checkpoint of what all ranks have written; keep: how many to leave, all when None. For rank 0.

    OSError or CheckpointError when it cannot be made; nothing else has changed then.
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
        retire(final.parents[1], keep)
    except OSError as error:                             # the checkpoint is there: the save has succeeded
        log.warning("old checkpoints could not be removed: %s", error)


def merge(indexes: dict[int, Any], facts: dict[str, Any], values: dict[str, Any]) -> Manifest:
    """The manifest of what all ranks have written."""
    manifest = Manifest(facts=facts, values=values)
    experts: dict[str, dict[int, tuple[str, tuple[int, ...], list[int]]]] = {}
    found: dict[str, tuple[str, tuple[int, ...], list[Chunk]]] = {}
    for rank, index in indexes.items():
        number, name_of_file = len(manifest.files), payload_name(rank)
        if index["file"] is not None:
            manifest.files[name_of_file] = File(*index["file"])
        for name, dtype, shape, begin, first, rows, *crcs in index["rows"]:
            kind = split_expert(name)
            if kind and rows == row_count(shape) and kind[1] not in experts.get(kind[0], ()):
                experts.setdefault(kind[0], {})[kind[1]] = (dtype, tuple(shape), [number, begin, *crcs])
                continue
            entry = found.setdefault(name, (dtype, tuple(shape), []))
            assert entry[:2] == (dtype, tuple(shape)), f"{name} is {dtype} {shape} on rank {rank}, {entry[:2]} elsewhere"
            entry[2].append(Chunk(name_of_file, begin, first, rows, tuple(crcs)))
    files = list(manifest.files)
    for pattern, by_id in experts.items():
        kinds = {(dtype, shape) for dtype, shape, _ in by_id.values()}
        if len(kinds) == 1 and by_id.keys() == set(range(len(by_id))):
            manifest.experts[pattern] = Table(*kinds.pop(), [by_id[expert][2] for expert in range(len(by_id))])
            continue
        for expert, (dtype, shape, (number, begin, *crcs)) in by_id.items():     # some of the experts: one by one
            chunks = found.setdefault(pattern.replace("*", str(expert)), (dtype, shape, []))[2]
            chunks.append(Chunk(files[number], begin, 0, row_count(shape), tuple(crcs)))
    manifest.tensors = {name: Entry(dtype, shape, tuple(sorted(chunks, key=lambda chunk: chunk.first)))
                        for name, (dtype, shape, chunks) in sorted(found.items())}
    return manifest


def check_written(directory: Path, ranks: int) -> None:
    """Read back what will count, by the rules a reader has: every row of every tensor once, every byte in its place."""
    hidden = {_index(directory, rank).name for rank in range(ranks)}
    manifest = read_manifest(directory)
    check_files(directory, manifest, but=hidden)


def retire(run_dir: Path, keep: int | None) -> list[Path]:
    """Remove checkpoints older than the newest `keep` sound ones, and damaged ones set aside; returns what was removed.

    keep None removes nothing. Directories of other names are somebody's own.
    """
    sound = [path for path in reversed(checkpoints_of(run_dir)) if is_sound(path)] if keep else []
    if not keep or len(sound) < keep:
        return []
    oldest = sound[keep - 1]
    old = [path for path in oldest.parent.glob("step-*")
           if is_step(path.name.removesuffix(".damaged")) and path.name[:13] < oldest.name]
    for path in sorted(old):
        grave = path.with_name(f"{path.name}.tmp-0")     # one step: never a checkpoint that lacks some of its files
        disk.remove_tree(grave)
        disk.rename(path, grave)
        disk.remove_tree(grave)
    return old


def remove_leftovers(run_dir: Path) -> None:
    """What saves left behind that were killed. Only while nobody saves in this directory."""
    for path in (run_dir / "checkpoints").glob("step-*.tmp*"):
        with suppress(OSError):
            disk.remove_tree(path)


def set_aside(path: Path) -> None:
    """Take a damaged checkpoint out of the way, for whoever wants to look into it."""
    aside = path.with_name(f"{path.name}.damaged")
    disk.remove_tree(aside)
    disk.rename(path, aside)


def _make_way(final: Path) -> bool:
    """False where a checkpoint of this step is there already and good; a damaged one goes aside."""
    if next(problems(final), None) is None:
        log.info("%s is there already", final)
        return False
    set_aside(final)
    return True


def _index(directory: Path, rank: int) -> Path:
    return directory / f"index-{rank:04d}.json"
