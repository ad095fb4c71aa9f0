"""Find whose code raised an exception: moetrain's, or a part or script that somebody wrote for it."""

import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import FrameSummary, extract_tb

from moetrain.errors import UserCodeError

_OURS = str(Path(__file__).resolve().parent)
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def frame_of_user(error: BaseException) -> FrameSummary | None:
    """Innermost frame in code of others that moetrain called; None where the exception is moetrain's own.

    Code that called moetrain, such as a script that calls `train`, stands before it in the traceback and is
    not meant.
    """
    called, found = False, None
    for frame in extract_tb(error.__traceback__):
        if frame.filename.startswith(_OURS):
            called = True
        elif called and Path(frame.filename).is_file() and not _is_library(frame.filename):
            found = frame
    return found


def of_user(error: Exception) -> UserCodeError | None:
    """Error that names file and line of the code that raised; None where that code is moetrain's."""
    frame = frame_of_user(error)
    if frame is None:
        return None
    said = f"{type(error).__name__}: {error}".rstrip(": ")
    why = "that code raised it"
    if frame.line:
        why = f"that code, which is not part of moetrain, raised it: {frame.line}"
    return UserCodeError(1, f"{said.splitlines()[0]}", why=why,
                         where=f"{frame.filename}:{frame.lineno}, in {frame.name}",
                         next="correct it there; MOETRAIN_DEBUG=1 shows the whole traceback")


@contextmanager
def named_in_traceback() -> Iterator[None]:
    """Name the place in code of others at the end of an exception's traceback.

    The frames between that place and the end are torch's and moetrain's.
    """
    try:
        yield
    except Exception as error:
        if frame := frame_of_user(error):
            error.add_note(f"raised by your code: {frame.filename}:{frame.lineno}, in {frame.name}")
        raise


def _is_library(file: str) -> bool:
    return "site-packages" in file or "dist-packages" in file or file.startswith(_LIBRARIES)
