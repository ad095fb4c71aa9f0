"""Progress bar of bytes on a terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int], None]


@contextmanager
def byte_progress() -> Iterator[Callable[[int], Advance]]:
    """Offer a progress bar of bytes, on a terminal alone.

    Yields what to call with the number of all bytes; it returns what to call with each number of bytes done.
    """
    if not sys.stderr.isatty():
        yield lambda total: lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        def begin(total: int) -> Advance:
            task = progress.add_task("", total=total)
            return lambda count: progress.advance(task, count)

        yield begin
