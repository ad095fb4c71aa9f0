"""Progress of data preparation: a bar on a terminal, otherwise a log line every few seconds."""

import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from moetrain.train.loggers.console import connect_logging
from moetrain.units import duration, size

log = logging.getLogger(__name__)

LINE_S = 10.0  # seconds between lines; work that takes less time prints none
_REFRESH_S = 0.1


class Preparing:
    """Callback for the progress of data preparation, and a context manager that removes the bar at its end.

    While there is a bar, the logger `moetrain` writes above it.

    Args:
        bar: whether to show a bar on a terminal.
    """

    def __init__(self, *, bar: bool = True) -> None:
        self._watched = (bar and sys.stdout.isatty() and sys.stderr.isatty()
                         and os.environ.get("TERM") != "dumb")
        self._bar: Any = None
        self._restore_logging: Callable[[], None] = lambda: None
        self._what, self._start, self._shown = "", 0.0, 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        """Report progress.

        Args:
            what: name of the part of the work.
            done: its bytes that are done.
            total: all of its bytes.
        """
        now = time.monotonic()
        if what != self._what:
            self._close()
            self._what, self._start, self._shown = what, now, now
            if self._watched:
                self._open(total)
        if now - self._shown < (_REFRESH_S if self._watched else LINE_S) and done < total:
            return
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done)
        elif now - self._shown >= LINE_S:
            log.info("[data] %s", progress_line(what, done, total, now - self._start))
        self._shown = now

    def __enter__(self) -> "Preparing":
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()

    def _open(self, total: int) -> None:
        import rich.console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), DownloadColumn(),
                   TransferSpeedColumn(), TextColumn("eta"), TimeRemainingColumn())
        self._bar = Progress(*columns, transient=True, refresh_per_second=4,
                             console=rich.console.Console(file=sys.stdout))
        self._bar.add_task(self._what, total=total)
        self._bar.start()
        console = self._bar.console
        self._restore_logging = connect_logging(
            lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True))

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._restore_logging()
            self._bar = None


def progress_line(what: str, done: int, total: int, seconds: float) -> str:
    """Format progress as text: `reading 120M of 500M, 24%, 45M/s, eta 8.40s`.

    Args:
        what: name of the part of the work.
        done: its bytes that are done.
        total: all of its bytes.
        seconds: time that it has taken so far.
    """
    rate = done / max(seconds, 1e-9)
    left = f", eta {duration((total - done) / rate)}" if done else ""
    return f"{what} {size(done)} of {size(total)}, {done / max(total, 1):.0%}, {size(rate)}/s{left}"
