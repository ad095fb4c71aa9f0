"""Atomic creation of dataset folders: one is written under another name and renamed to its place.

What an error leaves is removed. What a kill or Ctrl-C leaves is removed as well, unless shards of it are
finished (`split_writer.py`): then the next preparation of the same dataset continues from them, for a day.
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
def unfinished_folder(folder: Path) -> Iterator[Path]:
    """Context manager of the folder in which a dataset is written that will be at `folder`.

    It holds what an earlier, interrupted preparation of that dataset has left. The caller renames it. The
    kernel releases its lock when the process ends, so no other process takes a folder that is being written.
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
            log.warning("interrupted: the tokens that are written stay in %s for a day, and the same "
                        "command goes on behind them", shown(temporary))
        raise
    finally:
        if not keep:
            shutil.rmtree(temporary, ignore_errors=True)
        if claim is not None:
            os.close(claim)


def _claim(folder: Path) -> tuple[Path, int | None]:
    """A folder to write in, and the descriptor of its lock; None where folders cannot be locked.

    It is the one that a killed preparation may have left; while another process prepares the same dataset, a
    new one.
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
        # The lock is worth nothing if another process has removed or renamed the folder meanwhile.
        if claim is not None and is_at(claim, temporary):
            return temporary, claim
        if claim is not None:
            os.close(claim)
        temporary = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=folder.parent))


def _remove_stale(out: Path, own: Path) -> None:
    """Remove what killed preparations of other datasets have left.

    A folder with finished shards is kept for a day, and so is one that cannot be locked to ask whether it is
    in use.
    """
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
    """Whether a folder has finished shards from which a preparation can continue."""
    return any(folder.glob("*.resume"))


def _age_s(folder: Path) -> float:
    with suppress(OSError):
        return time.time() - folder.lstat().st_mtime
    return 0.0
