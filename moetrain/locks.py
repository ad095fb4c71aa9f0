"""File locks that the kernel lets go of when their process ends, however it ends."""

import fcntl
import os
from pathlib import Path


def try_lock(descriptor: int, *, shared: bool = False) -> bool:
    """Lock an open file or folder without waiting, until it is closed everywhere. OSError where the file system has no locks.

    False where another open file holds it: of another process, or of this one. shared: beside other shared ones.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def lock_folder(path: Path) -> int | None:
    """Descriptor of a folder that is locked until it is closed; None where another one holds it. OSError where folders cannot be
    locked, as on NFS."""
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
    """Whether the path still leads to the open file: it may have been removed, or another put in its place, before it was locked."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
