"""A directory that comes into being whole: written beside its place, and renamed when all of it is there.

    with new_directory("runs/large") as unfinished:
        (unfinished / "config.yaml").write_text(...)

Nothing is overwritten: where something is at the place already, nothing begins. An error in the block removes
what was written, and a killed process leaves `.<name>.<random>.tmp`, never half a directory of that name.
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moetrain.checkpoint import disk
from moetrain.errors import ConfigError, DiskError
from moetrain.files import reason, remedy


@contextmanager
def new_directory(out: str | Path) -> Iterator[Path]:
    """Yield a directory to write into, which has the name `out` after the block.

    Raises ConfigError where something is there, DiskError where the disk refuses.
    """
    place = Path(out).absolute()
    refuse_existing(place, str(out))
    unfinished = place.with_name(f".{place.name}.{secrets.token_hex(4)}.tmp")
    try:
        with disk_errors(place):
            disk.make_directory(unfinished)
        yield unfinished
        with disk_errors(place):
            disk.sync_directory(unfinished)
            refuse_existing(place, str(out))
            disk.rename(unfinished, place)
            disk.sync_directory(place.parent)
    except BaseException:
        with suppress(OSError):
            disk.remove_tree(unfinished)
        raise


def refuse_existing(place: Path, said: str | None = None) -> None:
    """Raise ConfigError where something is at a place: a file, a directory, or a link to nowhere.

    Args:
        place: the place.
        said: as the user wrote it.
    """
    if os.path.lexists(place):
        shown = said or str(place)
        raise ConfigError(322, "there is something of that name already", where=shown,
                          why="nothing is overwritten", next=f"another name; or rm -r {shown}")


@contextmanager
def disk_errors(place: Path) -> Iterator[None]:
    """Turn an OSError of the block into a DiskError that names the place."""
    try:
        yield
    except OSError as error:
        raise DiskError(50, "the directory cannot be written", where=str(place), why=reason(error),
                        next=f"{remedy(error)}, or another directory") from error
