"""Open files where anybody may have put something else, and show names that anybody may have chosen.

Standard library alone.

    open_regular    a file, opened without waiting; FIFOs, devices, folders, dangling links are refused
    create          a new file          open_to_append    one that grows
    read_bytes      all of it, up to a limit          read_text    as UTF-8          read_json    parsed
    parse_json      JSON that is not nested without end
    lies_inside     whether a name of a stranger stays in its folder, links included
    reason, remedy  what is wrong and what helps, for `why` and `next` of an error
    shown           a text whose control characters are escaped
    nearby          a path as short as its reader needs it

Whatever is wrong with the file raises OSError, whatever is wrong with its content ValueError; nothing else is
raised.
"""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

SMALL = 1 << 20                  # bytes: more than any record of one object that a run writes
MOST_DEPTH = 64                  # brackets inside each other: more than anything here writes
_JOINERS = "\u200c\u200d"        # they change how letters look (Persian, Hindi, emoji) and nothing else

_KINDS = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"),
          (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"))


class NotAFileError(OSError):
    """The path leads to something that is there and is not a regular file."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(errno.EINVAL, f"it is {what}, not a file", str(path))


def open_regular(path: Path, *, links: bool = True) -> BinaryIO:
    """Open a regular file for reading; with `links` false the path itself must not be a link."""
    return open(open_descriptor(path, os.O_RDONLY, links=links), "rb")


def open_descriptor(path: Path, flags: int, *, links: bool = True) -> int:
    """Open a descriptor as `os.open` does, but never wait, and for regular files alone.

    A new file gets mode 0644. With O_CREAT a link to nowhere is refused as well: what it names may lie
    anywhere.

    Args:
        path: the file.
        flags: as for `os.open`.
        links: whether the path itself may be a link.
    """
    flags |= os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY | (0 if links else os.O_NOFOLLOW)
    try:
        if flags & os.O_CREAT and not flags & os.O_EXCL:
            descriptor = _open_or_create(path, flags & ~os.O_CREAT)
        else:
            descriptor = os.open(path, flags, 0o644)
    except ValueError as error:                              # a NUL in the name
        raise OSError(errno.EINVAL, str(error), str(path)) from None
    except OSError as error:
        raise _named(path, error, links) from error
    if what := _what_else(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotAFileError(path, what)
    return descriptor


def create(path: Path) -> BinaryIO:
    """Open a new file for writing. What lay there goes; of a link the link alone."""
    path.unlink(missing_ok=True)
    return open(open_descriptor(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb")


def lies_inside(directory: Path, file: str) -> bool:
    """Whether the name of a file leads into a folder, links included.

    A snapshot of Hugging Face's cache links to files beside it: snapshots/<commit>/x to blobs/<digest>.
    """
    try:
        home = directory.resolve()
        homes = (home, home.parents[1] / "blobs") if home.parent.name == "snapshots" else (home,)
        place = (home / file).resolve()
    except (OSError, RuntimeError, ValueError):              # links in a circle, or no name of a file
        return False
    return any(place != own and place.is_relative_to(own) for own in homes)


def open_to_append(path: Path) -> BinaryIO:
    """Open a file for writing at its end, without a buffer; it is made where there is none."""
    return open(open_descriptor(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab", buffering=0)


def _open_or_create(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags)
    except FileNotFoundError:
        if os.path.islink(path):
            raise
    try:
        return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:                                  # another process was quicker
        return os.open(path, flags)


def _named(path: Path, error: OSError, links: bool) -> OSError:
    """The error itself, or a better one where the path leads to something that is no file."""
    if error.errno == errno.ELOOP:
        return NotAFileError(path, "a circle of links" if links or not os.path.islink(path) else "a link")
    if error.errno == errno.ENOENT and os.path.islink(path):
        return NotAFileError(path, "a link that leads nowhere")
    try:
        what = _what_else(os.stat(path).st_mode)             # a socket, or a pipe without a reader: ENXIO
    except OSError:
        what = None
    return NotAFileError(path, what) if what else error


def _what_else(mode: int) -> str | None:
    """Kind of a file that is not regular; None for a regular one."""
    if stat.S_ISREG(mode):
        return None
    return next((name for fits, name in _KINDS if fits(mode)), "something else")


def read_bytes(path: Path, *, limit: int, links: bool = True) -> bytes:
    """Read a regular file that is no longer than `limit` bytes."""
    with open_regular(path, links=links) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it is longer than {limit:,} bytes", str(path))
    return content


def read_text(path: Path, *, limit: int = SMALL) -> str:
    """Read a regular file as UTF-8."""
    return read_bytes(path, limit=limit).decode("utf-8")


def read_json(path: Path, *, limit: int = SMALL, depth: int = MOST_DEPTH) -> Any:
    """Read the value that a regular file holds as JSON."""
    return parse_json(read_bytes(path, limit=limit), depth=depth)


def parse_json(content: str | bytes, *, depth: int = MOST_DEPTH) -> Any:
    """Parse JSON nested at most `depth` deep, so that the result can be walked, printed and compared."""
    try:
        value = json.loads(content)
    except RecursionError:
        raise ValueError(f"it is nested more than {depth} deep") from None
    level = [value]
    for _ in range(depth + 1):
        level = [child for node in level if isinstance(node, (dict, list))
                 for child in (node.values() if isinstance(node, dict) else node)]
        if not level:
            return value
    raise ValueError(f"it is nested more than {depth} deep")


def reason(error: BaseException) -> str:
    """Text of an exception, short, for the `why` of an error."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return said or type(error).__name__


def remedy(error: OSError) -> str:
    """Remedy for a failure to write: the first words of an error's `next`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free space there"
    return "remove what lies there" if isinstance(error, NotAFileError) else "make it writable"


def shown(text: object, most: int | None = None) -> str:
    """Make text from outside safe on a terminal and on one line: what does not print is escaped as in Python.

    A byte of a file name that is not UTF-8 appears as `\\xe9`. A text longer than `most` characters is cut.
    """
    text = str(text)
    safe = text if text.isprintable() else "".join(map(_printable, text))
    return safe if most is None or len(safe) <= most else safe[:most - 1] + "…"


def nearby(path: Path) -> str:
    """Show a path safely: relative where it lies below the current folder."""
    here = Path.cwd()
    return shown(path.relative_to(here) if path.is_relative_to(here) else path)


def _printable(char: str) -> str:
    if char.isprintable() or char in _JOINERS:
        return char
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:                             # surrogateescape: a byte
        return f"\\x{code - 0xDC00:02x}"
    return char.encode("unicode_escape").decode("ascii")
