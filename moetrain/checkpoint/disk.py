"""Every change that a save makes to the disk goes through here: create, write, fsync, rename, remove.

One place, so that a test can look on, stop a save before or after each of them, or fill the disk. No torch here.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

BUFFER = 1 << 20

# (before or after, what, path, bytes). What an observer raises happens in place of the change.
Observer = Callable[[str, str, Path, int], None]
_observers: list[Observer] = []


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Call `observer` around every change while the block runs, on all threads of this process."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


@contextmanager
def new_file(path: Path) -> Iterator[Callable[[bytes | memoryview], None]]:
    """Create a file that must not exist; gives a function that appends. Its content is on the disk when the block ends."""
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
    with _change("create", path):
        path.mkdir(parents=True, exist_ok=True)


def sync_directory(path: Path) -> None:
    """The names in a directory are on the disk too."""
    with _change("fsync", path):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def rename(old: Path, new: Path) -> None:
    with _change("rename", old):
        old.rename(new)


def remove(path: Path) -> None:
    with _change("remove", path):
        path.unlink()


def remove_tree(path: Path) -> None:
    """A checkpoint's directory and what lies in it; fine when it is not there. A link goes, what it leads to stays."""
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
