"""Agreement between ranks: an action succeeds on all of them, or all of them leave with the same exit code.

Without a process group every function simply calls its action.
"""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from moetrain.comm.mesh import Group, Mesh
from moetrain.comm.reduce import largest_over
from moetrain.errors import DiskError, MoETrainError

T = TypeVar("T")

logger = logging.getLogger(__name__)

# Seconds between two small collectives while one rank works alone, so that no rank times out.
LOOK_S = 0.5


def all_or_none(group: Group, action: Callable[[], T]) -> T:
    """Run `action` on every rank and return its result once it has succeeded on all of them. Waits.

    Where it fails with a MoETrainError on one rank, no rank goes on: that rank raises the error, the others
    leave with its code.
    """
    failure: MoETrainError | None = None
    try:
        result = action()
    except MoETrainError as error:
        failure = error
    fail_together(group, failure)
    return result                                        # bound: a failure has raised


def fail_together(group: Group, failure: MoETrainError | None) -> None:
    """Return if no rank of the group has a failure.

    Otherwise a rank that has one raises it, and the others leave with its code.
    """
    code = int(largest_over(group, failure.code if failure else 0))
    if failure is not None:
        raise failure
    if code:
        logger.error("another rank cannot go on; log/rank-<n>.log of the run says why")
        raise SystemExit(code)


def on_first(group: Group, action: Callable[[], T]) -> T | None:
    """Run `action` on the group's first rank alone; the others wait, however long it takes there.

    The action runs in a thread of its own, while all ranks post a small collective every LOOK_S seconds. So
    no collective lasts longer than that, and none times out. A MoETrainError ends all ranks, as in
    `all_or_none`.

    Returns:
        The result of the action on the first rank, None on the others.
    """
    if group.process_group is None:
        return action()
    work: Future[T] | None = None
    if group.position == 0:
        work = Future()
        threading.Thread(target=_into, args=(work, action), name="alone", daemon=True).start()
    working = True
    while working:
        if work is not None:
            wait([work], timeout=LOOK_S)
        working = bool(largest_over(group, work is not None and not work.done()))
    return all_or_none(group, lambda: None if work is None else work.result())


def _into(work: Future, action: Callable[[], object]) -> None:
    """Run an action and keep its result, or what it raised, in a future."""
    try:
        work.set_result(action())
    except BaseException as error:                       # raised where the result is asked for
        work.set_exception(error)


def on_all(mesh: Mesh, write: Callable[[], None], failed: Callable[[str], DiskError]) -> None:
    """Run `write` on every rank; an OSError on one of them ends all ranks with a DiskError.

    Args:
        mesh: its group `batch` is the ranks that take part.
        write: writes the files of this rank.
        failed: makes the DiskError from the reason that the operating system gives.
    """

    def written() -> None:
        try:
            write()
        except OSError as error:
            raise failed(str(error.strerror or error)) from error

    all_or_none(mesh["batch"], written)


def from_first(batch: Group, action: Callable[[], Path | None]) -> Path | None:
    """Run `action` on the first rank and return its path on all ranks. Collective."""
    path = told_by_first(batch, on_first(batch, lambda: None if (found := action()) is None else str(found)))
    return Path(path) if path else None


def told_by_first(batch: Group, text: str | None) -> str | None:
    """Broadcast a text of the first rank. Collective."""
    said = [text]
    if batch.process_group is not None:
        dist.broadcast_object_list(said, src=0)
    return said[0]
