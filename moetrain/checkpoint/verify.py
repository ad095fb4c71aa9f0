"""Verification that a checkpoint is what was written, at two depths.

    sizes    the manifest, the size and header of every file, and that nothing else lies in the directory
    full     also every checksum: every byte is read

`moetrain checkpoint verify` and the retention of old checkpoints use it, too. This file imports no torch.
"""

import logging
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from moetrain.checkpoint.manifest import NAME, damaged, read_manifest
from moetrain.checkpoint.payload import Payload
from moetrain.checkpoint.records import Manifest
from moetrain.errors import CheckpointError

log = logging.getLogger(__name__)


def is_sound(directory: Path) -> bool:
    """Whether a checkpoint passes the verification by sizes."""
    try:
        check_files(directory, read_manifest(directory))
    except CheckpointError:
        return False
    return True


def check_files(directory: Path, manifest: Manifest, but: Collection[str] = ()) -> None:
    """Verify a checkpoint by sizes; CheckpointError names the first file that is wrong.

    Args:
        directory: of the checkpoint.
        manifest: what it should contain.
        but: names of other files that may be there.
    """
    for name, file in manifest.files.items():
        with Payload(directory / name, file) as payload:
            payload.check_header()
    for error in foreign_files(directory, manifest, but):
        raise error


def foreign_files(directory: Path, manifest: Manifest,
                  but: Collection[str] = ()) -> Iterator[CheckpointError]:
    """Yield an error for every file that no save wrote.

    Hidden files are allowed and never read: file systems and file managers create them.

    Args:
        directory: of the checkpoint.
        manifest: what it should contain.
        but: names of other files that may be there.
    """
    for path in sorted(directory.iterdir()):
        if path.name not in (NAME, *manifest.files, *but):
            if path.name.startswith("."):
                log.warning("%s does not belong to the checkpoint; it is ignored", path)
            else:
                yield damaged(path, "it does not belong to the checkpoint")


def problems(directory: Path,
             progress: Callable[[int], None] = lambda count: None) -> Iterator[CheckpointError]:
    """Verify a checkpoint in full and yield one error for every file that is wrong.

    Args:
        directory: of the checkpoint.
        progress: called with the number of bytes read since the last call.
    """
    try:
        manifest = read_manifest(directory)
    except CheckpointError as error:
        yield error
        return
    parts = manifest.parts()
    for name, file in manifest.files.items():
        try:
            with Payload(directory / name, file) as payload:
                payload.check_keys(parts[name], manifest.values["step"])
                for part in parts[name]:
                    for block in payload.blocks(part, manifest.block, 0, part.length):
                        progress(len(block))
        except CheckpointError as error:
            yield error
    yield from foreign_files(directory, manifest)
