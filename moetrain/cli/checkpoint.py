"""moetrain checkpoint verify <run or checkpoint>: compare every byte of checkpoints with its checksum.

<run> is a name or a directory, as it is or as run.name= or run.dir=. Prints one line a checkpoint; the exit
code is 13 when one of them is damaged.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moetrain.checkpoint.verify import problems
from moetrain.cli.inspect import named
from moetrain.config.suggest import nearest
from moetrain.errors import CheckpointError, ConfigError
from moetrain.units import decimal

_SUBCOMMANDS = ("verify",)


def run(argv: list[str]) -> int:
    """Run the verb on the words that follow it; returns the exit code."""
    if not argv or argv[0] not in _SUBCOMMANDS:
        given = argv[0] if argv else ""
        near = nearest(given, _SUBCOMMANDS) or list(_SUBCOMMANDS)
        raise ConfigError(
            42, f"there is no verb checkpoint {given}".rstrip(), where="the command line",
            why=f"checkpoint can {', '.join(_SUBCOMMANDS)}",
            next=f"moetrain checkpoint {near[0]} <run>")
    return verify(named(argv[1:], "checkpoint verify"))


def verify(checkpoints: list[Path]) -> int:
    """Read all checkpoints, then raise CheckpointError with every damaged file."""
    harm: list[CheckpointError] = []
    damaged = 0
    sizes = {directory: _bytes_in(directory) for directory in checkpoints}
    with _progress(sum(sizes.values())) as advance:
        for directory, size in sizes.items():
            began = time.perf_counter()
            found = list(problems(directory, advance))
            damaged += bool(found)
            harm += found
            seconds = time.perf_counter() - began
            word = "damaged" if found else "good"
            print(f"{word:8s} {directory}   {decimal(size, 'B', 4)} in {seconds:.1f} s")
            for error in found:
                print(f"         {Path(error.where).name}: {error.why}")
    if harm:
        raise CheckpointError(
            5, f"{damaged} of {len(checkpoints)} checkpoints {'is' if damaged == 1 else 'are'} damaged",
            where=", ".join(error.where for error in harm),
            why="the lines above say what is wrong with each file",
            next="restore the files; training passes over a damaged checkpoint and goes on from an older "
                 "one")
    return 0


def _bytes_in(directory: Path) -> int:
    return sum(path.lstat().st_size for path in directory.iterdir()) if directory.is_dir() else 0


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar of bytes on a terminal; yields what to call with each number of bytes read."""
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda count: progress.advance(task, count)
