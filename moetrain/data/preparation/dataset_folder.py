"""A dataset folder appears whole or not at all. Until then it is written under another name, beside its place.

What an error leaves is removed. What a kill or Ctrl-C leaves is removed as well, unless shards of it are finished
(data/preparation/split_writer.py): then the next preparation of the same dataset goes on from there, for a day.
"""

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moetrain.data.tokens.shards import unwritable
from moetrain.files import shown
from moetrain.locks import is_at, lock_folder

log = logging.getLogger(__name__)

_PREFIX = ".preparing-"
_STALE_S = 24 * 3600


@contextmanager
def unfinished(folder: Path) -> Iterator[Path]:
    """The folder to write a dataset in that is to be at `folder`, with what an earlier preparation of it has left.

    Who calls it renames it. The kernel lets go of its lock with its process, so nobody takes one that is written in.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary, claim = _claim(folder)
        temporary.chmod(0o755)
        _remove_stale(folder.parent, temporary)
    except OSError as error:
        raise unwritable(folder.parent, error) from error
    keep = False
    try:
        yield temporary
    except KeyboardInterrupt:
        keep = claim is not None and temporary.name == _PREFIX + folder.name and _has_shards(temporary)
        if keep:
            log.warning("interrupted: the tokens that are written stay in %s for a day, and the same command "
                        "goes on behind them",
                        shown(temporary))
        raise
    finally:
        if not keep:
            shutil.rmtree(temporary, ignore_errors=True)
        if claim is not None:
            os.close(claim)


def _claim(folder: Path) -> tuple[Path, int | None]:
    """A folder for a dataset, and the lock that says that somebody writes in it; None where folders cannot be locked.

    The one that a killed preparation may have left, or while another process prepares the same, a new one.
    """
    temporary = folder.with_name(_PREFIX + folder.name)
    temporary.mkdir(exist_ok=True)
    while True:
        try:
            claim = lock_folder(temporary)
        except FileNotFoundError:
            claim = None
        except OSError:
            return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=folder.parent)), None
        # otherwise another process has removed or renamed it since
        if claim is not None and is_at(claim, temporary):
            return temporary, claim
        if claim is not None:
            os.close(claim)
        temporary = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=folder.parent))


def _remove_stale(out: Path, own: Path) -> None:
    """Remove what killed preparations of other datasets have left, and what has no lock to ask where it is old."""
    for folder in out.glob(f"{_PREFIX}*"):
        if folder == own or _has_shards(folder) and _age_s(folder) < _STALE_S:
            continue
        try:
            claim = lock_folder(folder)
        except OSError:
            if _age_s(folder) > _STALE_S:
                shutil.rmtree(folder, ignore_errors=True)
            continue
        if claim is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(claim)


def _has_shards(folder: Path) -> bool:
    return any(folder.glob("*.resume"))


def _age_s(folder: Path) -> float:
    with suppress(OSError):
        return time.time() - folder.lstat().st_mtime
    return 0.0
