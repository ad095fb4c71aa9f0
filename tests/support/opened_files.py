"""Record which files this process opens, by an audit hook of the interpreter."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_lists: list[list[str]] = []


def _hook(event: str, arguments: tuple) -> None:
    if _lists and event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        for paths in _lists:
            paths.append(os.path.abspath(os.fsdecode(arguments[0])))


sys.addaudithook(_hook)                      # it cannot be taken away again


@contextmanager
def opened_files(folder: Path) -> Iterator[list[str]]:
    """Names of existing files below a folder that the block opens, sorted; filled in at its end."""
    paths: list[str] = []
    found: list[str] = []
    _lists.append(paths)
    try:
        yield found
    finally:
        _lists.remove(paths)
        root = os.path.abspath(folder) + os.sep
        found += sorted({path.removeprefix(root) for path in paths
                         if path.startswith(root) and os.path.exists(path)})
