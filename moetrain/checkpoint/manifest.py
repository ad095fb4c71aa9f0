"""Reading of a checkpoint's manifest: which rows of which tensor lie where, with checksums.

It is JSON, never a pickle, and this file imports no torch.

    line 1      CRC-32 of the rest, eight hexadecimal digits
    the rest    {"version", "facts", "values", "block",
                 "files":   {name: [size, header, crc of the header]},
                 "tensors": {name: [dtype, shape, [[file, begin, first row, rows, crc, ...], ...]]},
                 "experts": {name with * for the expert: [dtype, shape, [[file, begin, crc, ...], ...]]}}

`file` is an index into `files`; `begin` and `header` are bytes. A chunk is a range of rows, whose length in
bytes follows from dtype, shape and rows, with one CRC-32 for every `block` bytes. Experts that lie whole in
one chunk share a table, in which the row is the expert's id. Headers and chunks cover every byte of every
file exactly once, and chunks every row of every tensor.

A manifest is treated as hostile input: everything that this file returns has passed all of its
checks. Saves are renamed into place as a whole, so a step's directory without a manifest is a
damaged checkpoint, and so is a link.
"""

import json
import re
import zlib
from math import prod
from pathlib import Path
from typing import Any, NoReturn

from moetrain.checkpoint.records import (
    ITEM_BYTES,
    VERSION,
    Chunk,
    ExpertTable,
    Manifest,
    PayloadFile,
    TensorEntry,
    row_bytes,
    row_count,
    split_expert,
)
from moetrain.errors import CheckpointError
from moetrain.files import read_bytes, reason

NAME = "manifest.json"
MAX_BYTES = 100 << 20  # size limit of a manifest, and of the header of a payload file
MAX_COUNT = 1 << 62     # limit of steps and tokens, so that int64 can count on from there
_FILE = re.compile(r"rank-[0-9]{4,6}\.safetensors")
_STEP = re.compile(r"step-[0-9]{8}")


def read_manifest(directory: Path) -> Manifest:
    """Read and check the manifest of a checkpoint's directory.

    Raises CheckpointError, which names the file, when the manifest is missing, damaged or invalid.
    """
    path = directory / NAME
    if is_step(directory.name) and directory.is_symlink():
        raise damaged(directory, "it is a link, not a directory of the run")
    try:
        raw = read_checked(path)
        _require(isinstance(raw, dict), "it is not a JSON object")
        if raw.get("version") != VERSION:
            raise _Wrong(f"version {raw.get('version')!r} is not {VERSION}, the one this release reads")
        manifest = _manifest(raw)
        _require(not is_step(directory.name) or manifest.values["step"] == step_of(directory),
                 f"it is of step {manifest.values['step']}, in a directory of another step")
        return manifest
    except OSError as error:
        raise damaged(path, f"it cannot be read: {reason(error)}") from error
    except (_Wrong, ValueError, TypeError, KeyError, RecursionError) as error:
        why = str(error) if isinstance(error, _Wrong) else f"it is not a manifest of moetrain: {error!r}"
        raise damaged(path, why) from error


def read_checked(path: Path) -> Any:
    """Read JSON below a line with its checksum, as `with_checksum` writes it.

    Raises ValueError or OSError when the file is damaged or cannot be read.
    """
    content = read_bytes(path, limit=MAX_BYTES, links=False)
    head, _, body = content.partition(b"\n")
    _require(head == b"%08x" % zlib.crc32(body), "its checksum does not match: it is truncated or altered")
    return json.loads(body.decode(), object_pairs_hook=_no_duplicates, parse_constant=_no_constants)


def is_step(name: str) -> bool:
    """Whether a directory of this name is a checkpoint: `step-` and eight digits."""
    return _STEP.fullmatch(name) is not None


def checkpoints_of(run_dir: Path) -> list[Path]:
    """List the checkpoints of a run, sound or damaged, oldest first."""
    return sorted(path for path in (run_dir / "checkpoints").glob("step-*") if is_step(path.name))


def newest(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run; None when there is none."""
    return max(checkpoints_of(run_dir), default=None)


def step_of(directory: Path) -> int:
    """Step of a checkpoint, from the name of its directory."""
    return int(directory.name.removeprefix("step-"))


def damaged(path: Path, why: str) -> CheckpointError:
    """Return the error of a damaged checkpoint file."""
    return CheckpointError(
        1, "a checkpoint file is damaged or foreign", where=str(path), why=why,
        next="restore the file, or move this step's directory away to continue from an older one",
    )


def is_damage(error: CheckpointError) -> bool:
    """Whether an error says that a checkpoint is damaged, so that an older one may be loaded instead."""
    return error.id == "E-CHECKPOINT-001"


# --- rules that a manifest must obey


class _Wrong(ValueError):
    """Violation of a rule by a manifest."""


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise _Wrong(otherwise)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    _require(len(record) == len(pairs), "it names something twice")
    return record


def _no_constants(text: str) -> NoReturn:
    raise _Wrong(f"{text} is not a number")


def _manifest(raw: dict[str, Any]) -> Manifest:
    _require(type(raw["block"]) is int and raw["block"] > 0, "its block size is not a positive number")
    for part in ("facts", "values", "files", "tensors", "experts"):
        _require(isinstance(raw[part], dict), f"{part} is not an object")
    _require(all(_natural(raw["values"].get(key)) and raw["values"][key] < MAX_COUNT
                 for key in ("step", "tokens")),
             "step or tokens is no number, or too large")
    files = {name: _file(name, record) for name, record in raw["files"].items()}
    manifest = Manifest(raw["facts"], raw["values"], files, block=raw["block"])
    used: list[list[tuple[int, int]]] = [[] for _ in files]
    for name, record in raw["tensors"].items():
        manifest.tensors[name] = _entry(name, record, list(files), manifest.block, used)
    for pattern, record in raw["experts"].items():
        manifest.experts[pattern] = _table(pattern, record, manifest.block, used)
    _no_name_twice(manifest)
    for (name, file), ranges in zip(files.items(), used):
        _covers(name, file, ranges)
    return manifest


def _natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_natural, value))


def _file(name: str, record: Any) -> PayloadFile:
    _require(_FILE.fullmatch(name) is not None, f"it names a file that no save writes: {name!r}")
    _require(_numbers(record) and len(record) == 3, f"the sizes of {name} are not numbers")
    file = PayloadFile(*record)
    _require(10 <= file.header <= min(file.size, MAX_BYTES) and file.crc < 1 << 32,
             f"the header of {name} has an impossible size")
    return file


def _tensor(name: str, dtype: Any, shape: Any) -> tuple[str, tuple[int, ...]]:
    _require(0 < len(name) <= 512 and name.isprintable(), f"{name[:64]!r} is no name of a tensor")
    _require(isinstance(dtype, str) and dtype in ITEM_BYTES, f"{name} has an unknown dtype {dtype!r}")
    _require(isinstance(shape, list) and len(shape) <= 8 and all(map(_natural, shape)),
             f"{name} has an impossible shape")
    _require(_natural(prod(max(1, size) for size in shape) * ITEM_BYTES[dtype]),
             f"{name} is larger than any disk")
    return dtype, tuple(shape)


def _entry(name: str, record: Any, files: list[str], block: int,
           used: list[list[tuple[int, int]]]) -> TensorEntry:
    dtype, shape, rows = record
    dtype, shape = _tensor(name, dtype, shape)
    entry, next_row = TensorEntry(dtype, shape, ()), 0
    chunks, width = [], row_bytes(entry)
    for row in rows:
        _require(_numbers(row) and len(row) >= 4, f"a chunk of {name} is not made of numbers")
        file, begin, first, count, *crcs = row
        _require(first == next_row and count > 0,
                 f"rows {next_row} to {first} of {name} are missing or there twice")
        _place(name, file, begin, count * width, crcs, block, used)
        chunks.append(Chunk(files[file], begin, first, count, tuple(crcs)))
        next_row = first + count
    _require(next_row == (row_count(shape) if width else 0),
             f"{name} has {next_row} rows of {row_count(shape)}")
    return entry._replace(chunks=tuple(chunks))


def _table(pattern: str, record: Any, block: int, used: list[list[tuple[int, int]]]) -> ExpertTable:
    _require(pattern.count("*") == 1 and split_expert(pattern.replace("*", "0")) == (pattern, 0),
             f"{pattern[:64]!r} names no experts")
    dtype, shape, rows = record
    table = ExpertTable(*_tensor(pattern, dtype, shape), rows)
    length = row_count(table.shape) * row_bytes(table)
    _require(isinstance(rows, list) and 0 < len(rows) < 10**7 and length > 0, f"{pattern} has no content")
    for row in rows:
        _require(_numbers(row) and len(row) >= 2, f"an expert of {pattern} is not made of numbers")
        _place(pattern, row[0], row[1], length, row[2:], block, used)
    return table


def _place(name: str, file: int, begin: int, length: int, crcs: list[int], block: int,
           used: list[list[tuple[int, int]]]) -> None:
    """Check the place of a chunk and add its range of bytes to `used`."""
    _require(file < len(used), f"{name} lies in a file that is not listed")
    _require(length > 0 and len(crcs) == -(-length // block) and max(crcs) < 1 << 32,
             f"{name} has the wrong number of checksums")
    used[file].append((begin, length))


def _no_name_twice(manifest: Manifest) -> None:
    _require(len(manifest.stored_names) == len(manifest.tensors), "two of its tensors have one name today")
    for name in manifest.tensors:
        pattern, expert = split_expert(name) or ("", 0)
        table = manifest.experts.get(pattern)
        _require(table is None or expert >= len(table.rows), f"{name} is missing rows, or there twice")


def _covers(name: str, file: PayloadFile, ranges: list[tuple[int, int]]) -> None:
    """Require that header and chunks cover every byte of a file exactly once."""
    end = file.header
    for begin, length in sorted(ranges):
        _require(begin == end,
                 f"bytes {min(begin, end)} to {max(begin, end)} of {name} "
                 "belong to nothing, or to two tensors")
        end = begin + length
    _require(end == file.size, f"{name} should be {end} bytes long, not {file.size}")
