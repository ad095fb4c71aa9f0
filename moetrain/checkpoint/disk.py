"""Disk operations of a save: create, write, fsync, rename, remove.

Every change that a save makes goes through this file, so that a test can observe it, stop a save before or
after it, or fill the disk. This file imports no torch.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

BUFFER = 1 << 20

# Called with ("before" or "after", operation, path, bytes). An exception that it raises before
# takes the place of the change.
Observer = Callable[[str, str, Path, int], None]
_observers: list[Observer] = []


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Call `observer` around every change while the block runs, in all threads of this process."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


@contextmanager
def new_file(path: Path) -> Iterator[Callable[[bytes | memoryview], None]]:
    """Create a file that must not exist yet, and yield a function that appends to it.

    The content is on the disk (fsync) when the block ends.
    """
    with _change("create", path):
        file = path.open("xb", buffering=BUFFER)
    with file:
        def append(content: bytes | memoryview) -> None:
            with _change("write", path, len(content)):
                file.write(content)

        yield append
        with _change("fsync", path):
            file.flush()
            os.fsync(file.fileno())


def make_directory(path: Path) -> None:
    """Create a directory and its parents, as far as they do not exist."""
    with _change("create", path):
        path.mkdir(parents=True, exist_ok=True)


def sync_directory(path: Path) -> None:
    """Bring the names in a directory to the disk (fsync)."""
    with _change("fsync", path):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def rename(old: Path, new: Path) -> None:
    """Rename a file or directory."""
    with _change("rename", old):
        old.rename(new)


def remove(path: Path) -> None:
    """Remove a file or a link."""
    with _change("remove", path):
        path.unlink()


def remove_tree(path: Path) -> None:
    """Remove a directory and its content, if it exists. Links are removed, their targets are not."""
    if path.is_symlink():
        remove(path)
        return
    with suppress(FileNotFoundError):
        for entry in path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                remove_tree(entry)
            else:
                remove(entry)
        with _change("remove", path):
            path.rmdir()


@contextmanager
def _change(what: str, path: Path, count: int = 0) -> Iterator[None]:
    for observer in tuple(_observers):
        observer("before", what, path, count)
    yield
    for observer in tuple(_observers):
        observer("after", what, path, count)
