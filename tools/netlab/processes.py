"""Start, wait for and stop the processes of ranks. Every wait ends, and names the ranks that are missing.

    any failure            the others have GRACE_S to end on their own
    a signal to this tool  it is passed on; the ranks have SAVE_S to end or save in their own way
    a rank ended well      the others have LATE_S, so that one that hangs behind the last barrier is found
    limit_s                the whole run, where the caller sets it

Then SIGTERM, TERM_S later SIGKILL. What a rank left behind goes with its network (tools/netlab/lab.py).
"""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from moetrain.launch.signals import forward_signals

GRACE_S, SAVE_S, LATE_S = 10.0, 120.0, 300.0
TERM_S, KILL_S = 5.0, 5.0
TIMED_OUT = 124                # exit code, as timeout(1) uses it


class LabError(Exception):
    """What this machine lacks, or what is wrong with the call, as one message for the terminal."""

    def __init__(self, what: str, *, why: str, next: str) -> None:
        super().__init__(f"netlab: {what}\n  why     {why}\n  try     {next}")


def together(start: Callable[..., subprocess.Popen], world: int, limit_s: float = math.inf) -> int:
    """Start all ranks and wait until they have ended.

    Rank 0 writes to this terminal, the others to stderr behind their number.

    Args:
        start: start(rank, **popen) returns the process of a rank.
        world: number of ranks.
        limit_s: seconds after which ranks that still run are named and stopped.

    Returns:
        0; or the exit code of the rank that failed first, 128 + n for signal n; or TIMED_OUT; or 128 + n for
        the signal n that this program was sent.
    """
    ranks: list[subprocess.Popen] = []
    readers = []
    with _forwarding(ranks) as asked:
        try:
            for rank in range(world):
                piped = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True,
                         "errors": "replace"}
                own = piped if rank else {}
                ranks.append(start(rank, **own))
                if asked:                                # a signal came while ranks were starting
                    _signal(ranks[rank], asked[-1])
                if rank:
                    readers.append(threading.Thread(target=_show, args=(rank, ranks[rank]), daemon=True))
                    readers[-1].start()
            failed, missing, since = _wait(ranks, asked, limit_s)
        finally:
            _stop(ranks)
            for reader in readers:
                reader.join(1)
    code = ranks[failed].returncode if failed is not None else 0
    if failed is not None:
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        print(f"netlab: rank {failed} {how}", file=sys.stderr)
    for rank, state in missing.items():
        print(f"netlab: rank {rank} ({state}) still ran {since}, and was stopped", file=sys.stderr)
    if missing and failed is None:
        return 128 + asked[-1] if asked else TIMED_OUT
    return 128 - code if code < 0 else code


def _wait(
    ranks: list[subprocess.Popen], asked: list[int], limit_s: float,
) -> tuple[int | None, dict[int, str], str]:
    """Wait until all have ended or a limit is over.

    Returns:
        The rank that failed first; the states of the ranks that still run; since when they should have ended.
    """
    began, failed, running = time.monotonic(), None, set(range(len(ranks)))
    limits = {f"{limit_s:g} s after the start": began + limit_s}
    while running and time.monotonic() < min(limits.values()):
        for rank in sorted(running):
            code = ranks[rank].poll()
            if code is None:
                continue
            running.discard(rank)
            if code and failed is None:
                failed = rank
                limits[f"{GRACE_S:g} s after rank {rank} failed"] = time.monotonic() + GRACE_S
            elif not code:
                limits.setdefault(f"{LATE_S:g} s after others had ended", time.monotonic() + LATE_S)
        if asked:
            saving = f"{SAVE_S:g} s after {signal.Signals(asked[0]).name}"
            limits.setdefault(saving, time.monotonic() + SAVE_S)
        time.sleep(0.02)
    return failed, {rank: _state(ranks[rank].pid) for rank in sorted(running)}, min(limits, key=limits.get)


def _state(process: int) -> str:
    """State of a process as the kernel calls it: running, sleeping, stopped, disk sleep."""
    with suppress(OSError), open(f"/proc/{process}/status") as rows:
        return next(row for row in rows if row.startswith("State")).split("(")[1].rstrip(")\n")
    return "gone"


def _stop(ranks: list[subprocess.Popen]) -> None:
    for rank in ranks:
        _signal(rank, signal.SIGTERM)
    end(ranks, TERM_S)


def end(processes: list[subprocess.Popen], within_s: float) -> None:
    """Wait for all processes, then send SIGKILL to the rest and their children."""
    deadline = time.monotonic() + within_s
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        _signal(process, signal.SIGKILL)
    for process in processes:
        with suppress(subprocess.TimeoutExpired):        # the kernel does not let go of it: no wait helps
            process.wait(KILL_S)


def _signal(process: subprocess.Popen, number: int) -> None:
    """Send a signal to a process that still runs, and to its children."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)


@contextmanager
def _forwarding(ranks: list[subprocess.Popen]) -> Iterator[list[int]]:
    """Pass signals on to the ranks and end after them. Yields the numbers of those that ask for the end."""
    asked: list[int] = []

    def send(number: int) -> None:
        if number != signal.SIGUSR1:
            asked.append(number)
        for rank in ranks:
            _signal(rank, number)

    with forward_signals(send):
        yield asked


def _show(rank: int, process: subprocess.Popen) -> None:
    for line in process.stdout:
        sys.stderr.write(f"[rank {rank}] {line}")
