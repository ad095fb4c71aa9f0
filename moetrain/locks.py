"""File locks that the kernel releases when their process ends, however it ends."""

import fcntl
import os
from pathlib import Path


def try_lock(descriptor: int, *, shared: bool = False) -> bool:
    """Lock an open file or folder without waiting; the lock lasts until the file is closed everywhere.

    Args:
        descriptor: the open file.
        shared: allow other shared locks beside this one.

    Returns:
        False where another open file holds the lock: of another process, or of this one.

    Raises:
        OSError: the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def lock_folder(path: Path) -> int | None:
    """Lock a folder until its descriptor is closed.

    Returns None where another process holds the lock, and raises OSError where folders cannot be locked, as
    on NFS.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if try_lock(descriptor):
            return descriptor
    except OSError:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def is_at(descriptor: int, path: Path) -> bool:
    """Whether a path still leads to the open file, which may have been replaced before it was locked."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
