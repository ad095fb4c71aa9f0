"""Files of a report, replaced atomically, and names in its pictures, drawn as plain text without markup."""

import csv
import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any, BinaryIO

from moetrain.errors import DiskError
from moetrain.files import reason, remedy, shown
from moetrain.runs.files import replace_atomically

_FONTS = logging.getLogger("matplotlib.font_manager")
MAX_NAME_LENGTH = 28  # letters of a name in a picture


@contextmanager
def report_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file of the report for writing; it replaces `path` when the block ends."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_atomically(path) as file:
            yield file
    except OSError as error:
        raise unwritable(path, error) from error


def write_csv(path: Path, rows: Iterable[Iterable[object]]) -> None:
    """Write a CSV file of the report."""
    text = StringIO(newline="")
    csv.writer(text).writerows(rows)
    with report_file(path) as file:
        file.write(text.getvalue().encode())


def unwritable(path: Path, error: OSError) -> DiskError:
    """Return the error of a report file that cannot be written."""
    return DiskError(41, "the report cannot be written", where=str(path), why=reason(error),
                     next=f"{remedy(error)}, or copy the run and report the copy: "
                          "moetrain report <directory>")


class Lettering:
    """Names as a picture can show them: shortened, in fonts of this machine that have their characters.

    Characters that no font has are escaped. While the context manager is entered, matplotlib takes no text
    for markup and prints no warnings about fonts and layouts.

    Args:
        names: all names that the picture will show.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._families, self._missing = _fonts({char for name in names for char in shown(name)})
        self._open: list[Any] = []

    def __call__(self, name: str) -> str:
        safe = "".join(char.encode("unicode_escape").decode() if char in self._missing else char
                       for char in shown(name))
        return shown(safe, MAX_NAME_LENGTH)

    def __enter__(self) -> "Lettering":
        from matplotlib import rc_context

        self._open = [warnings.catch_warnings(),
                      rc_context({"font.family": self._families, "text.parse_math": False})]
        for context in self._open:
            context.__enter__()
        warnings.simplefilter("ignore")
        self._level = _FONTS.level
        _FONTS.setLevel(logging.ERROR)
        return self

    def __exit__(self, *exception: object) -> None:
        _FONTS.setLevel(self._level)
        while self._open:
            self._open.pop().__exit__(*exception)


def _fonts(characters: set[str]) -> tuple[list[str], set[str]]:
    """Choose fonts for a set of characters.

    Returns:
        Font families that have the characters together, matplotlib's own first; the characters that none has.
    """
    from matplotlib import rcParams
    from matplotlib.font_manager import FontProperties, findfont, fontManager

    families = list(rcParams["font.family"])
    usual = findfont(FontProperties(family=families))
    missing = {char for char in characters if not _has(usual, char)}
    for entry in sorted(fontManager.ttflist,
                        key=lambda entry: (entry.style != "normal", entry.weight != 400, entry.name)):
        if not missing:
            break
        if entry.name.startswith("Last Resort"):  # it has every character, but draws a box for each
            continue
        if found := {char for char in missing if _has(entry.fname, char)}:
            families.append(entry.name)
            missing -= found
    return families, missing


def _has(file: str, char: str) -> bool:
    from matplotlib.font_manager import get_font

    try:
        font = get_font(file)
        return bool(font.scalable and font.get_char_index(ord(char)))
    except (OSError, RuntimeError):  # this build of FreeType cannot read the font
        return False
