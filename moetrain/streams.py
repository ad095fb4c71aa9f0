"""Standard output and error that cannot end a process: closed, full, a broken pipe, a terminal that is gone.

    keep_open   descriptors 0 to 2 exist, and nothing that is written to stdout or stderr raises
    lost        why stdout could not be written; for verbs whose product is what they print
    outlive     from now on the output is an extra: what nobody takes is left out

A training run goes on without its output; the files of the run get everything. A pipe whose reader sleeps and
a terminal that was stopped by Ctrl-S are waited for a few seconds, once, because other ranks wait for this
one. `moetrain eval | less` waits as long as it takes.
"""

import errno
import io
import os
import select
import sys
from typing import TextIO

WAIT_S = 5.0                 # seconds that a reader is waited for before output is left out
PIECE = 4096                 # bytes that a pipe takes whole once it is ready
_PASSING = (errno.ENOSPC, errno.EDQUOT)                  # space may come back; anything else does not


class _Output(io.FileIO):
    """A descriptor whose failures are kept, not raised."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self.lost: OSError | None = None
        self.is_extra = False
        self.left_out = 0

    def write(self, data: bytes) -> int:
        view = memoryview(data)
        try:
            if self._is_ready():
                return self._write(view)
        except OSError as error:
            self.lost = error
            if error.errno not in _PASSING:
                self._discard_from_now_on()
        self.left_out += len(view)
        return len(view)

    def _is_ready(self) -> bool:
        wait_s = None if not self.is_extra else 0.0 if self.left_out else WAIT_S
        return bool(select.select([], [self], [], wait_s)[1])

    def _write(self, view: memoryview) -> int:
        if self.left_out:
            note = f"[warn] {self.left_out} bytes of output could not be written here\n"
            super().write(note.encode())
            self.left_out = 0
        # None from a descriptor that does not wait: it is asked again.
        return super().write(view[:PIECE]) or 0

    def _discard_from_now_on(self) -> None:
        """Discard output of this process, of libraries in it, and of processes that it starts."""
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self.fileno())
        os.close(nothing)


def keep_open() -> None:
    """Make the streams of this process unbreakable, and open those that are closed.

    A closed descriptor would be given to the next file that is opened.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)               # takes the lowest number that is free: this one
    sys.stdout = sys.__stdout__ = _unbreakable(sys.stdout, 1)
    sys.stderr = sys.__stderr__ = _unbreakable(sys.stderr, 2)


def _unbreakable(stream: TextIO | None, descriptor: int) -> TextIO:
    """Stream of a descriptor that never raises; `stream` is Python's own, None where it was closed."""
    return io.TextIOWrapper(
        io.BufferedWriter(_Output(descriptor)), encoding=getattr(stream, "encoding", None) or "utf-8",
        errors=getattr(stream, "errors", None) or "backslashreplace",
        line_buffering=getattr(stream, "line_buffering", True),
        write_through=getattr(stream, "write_through", False))


def outlive() -> None:
    """Go on whatever becomes of the output."""
    for stream in (sys.stdout, sys.stderr):
        if output := _output(stream):
            output.is_extra = True


def lost() -> OSError | None:
    """Why output to stdout could not be written; None for a reader that has seen enough, such as `head`."""
    output = _output(sys.stdout)
    if output is None or output.is_extra:
        return None
    sys.stdout.flush()
    return None if isinstance(output.lost, BrokenPipeError) else output.lost


def _output(stream: TextIO) -> _Output | None:
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    return raw if isinstance(raw, _Output) else None
