"""The manifest of a checkpoint: which tensor lies where, with a checksum for each. JSON, no pickle.

    line 1      CRC-32 of the rest, eight hexadecimal digits
    the rest    {"version", "facts", "values", "files": {name: size},
                 "tensors": {name: [dtype, shape, file, begin, length, crc]}}

`begin` and `length` are bytes in the payload file (safetensors). A directory without a manifest is not a checkpoint.
"""

import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from moetrain.errors import CheckpointError

NAME = "manifest.json"
VERSION = 1


class Entry(NamedTuple):
    """One tensor in a payload file."""

    dtype: str
    shape: tuple[int, ...]
    file: str
    begin: int
    length: int
    crc: int


@dataclass
class Manifest:
    facts: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    tensors: dict[str, Entry] = field(default_factory=dict)

    def encode(self) -> bytes:
        body = json.dumps(
            {"version": VERSION, "facts": self.facts, "values": self.values, "files": self.files,
             "tensors": self.tensors},
            allow_nan=False, separators=(",", ":"),
        ).encode()
        return b"%08x\n%b" % (zlib.crc32(body), body)


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint directory; CheckpointError names the file when it cannot be trusted."""
    path = directory / NAME
    try:
        head, _, body = path.read_bytes().partition(b"\n")
    except OSError as error:
        raise damaged(path, f"it cannot be read: {error.strerror}") from error
    if head != b"%08x" % zlib.crc32(body):
        raise damaged(path, "its checksum does not match: it is truncated or altered")
    try:
        raw = json.loads(body)
        if raw["version"] != VERSION:
            raise damaged(path, f"version {raw['version']} is not {VERSION}, the one this release reads")
        tensors = {name: Entry(dtype, tuple(shape), *place) for name, (dtype, shape, *place) in raw["tensors"].items()}
        manifest = Manifest(raw["facts"], raw["values"], raw["files"], tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(path, f"it is not a manifest of moetrain: {error!r}") from error
    for name in manifest.files:
        if name != Path(name).name or name.startswith("."):
            raise damaged(path, f"it names a file outside its directory: {name!r}")
    return manifest


def newest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run; None when there is none."""
    complete = [path for path in (run_dir / "checkpoints").glob("step-????????") if (path / NAME).exists()]
    return max(complete, default=None)


def damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        1, "a checkpoint file is damaged or foreign", where=str(path), why=why,
        next="restore the file, or move this step's directory away to continue from an older one",
    )
