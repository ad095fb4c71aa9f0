"""Start the ranks of a run on this machine (run.nproc) and wait for them.

    train_on_ranks   what `moetrain train run.nproc=...` does
    start_ranks      one process per rank, as torchrun would start them on one node
    persist          start them again when one was lost, a few times

Rank 0 keeps the terminal; the others write <run.dir>/log/rank-N.log. No torch here.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from moetrain.config.compose import compose, run_dir
from moetrain.files import open_regular
from moetrain.launch.rank import DONE, LAUNCHED
from moetrain.launch.signals import forward_signals
from moetrain.launch.status import open_log, write_status
from moetrain.runs.lock import process_state

# Seconds the other ranks get to end on their own after one failed, and then after SIGTERM.
GRACE_S = 10.0
TERM_S = 5.0

_SAVED, _PEER = 10, 16                   # exit codes of a rank that was told to stop and saved, and of one that waited in vain
_LOG_TAIL = 1 << 16                      # bytes of a rank's log in which its last error is looked for


def start_ranks(argv: Sequence[str], nproc: int, run_dir: Path, *, record: bool = True) -> int:
    """Run `python -m moetrain <argv>` on nproc ranks and wait for them.

    Returns 0, or the exit code of the rank that failed first: 16 when a signal killed it or it left without having done its
    work, 128 + signal when that signal was passed on from here. record: status.json says so too, where rank 0 could not.
    """
    logs = [None] + [open_log(run_dir, rank) for rank in range(1, nproc)]
    reads, writes = os.pipe()
    common = {**_environment(nproc), DONE: str(writes)}
    workers: list[subprocess.Popen] = []
    with _forwarding(workers) as forwarded:
        for rank, file in enumerate(logs):
            # A group of its own: Ctrl-C reaches a rank once, through us. It cannot read from the terminal.
            workers.append(subprocess.Popen(
                [sys.executable, "-m", "moetrain", *argv], stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, process_group=0, pass_fds=[writes]))
            if forwarded:                # a signal came while we were starting
                workers[-1].send_signal(forwarded[-1])
        try:
            failed, unresponsive = _wait(workers)
        finally:
            _stop(workers)
    os.close(writes)
    with os.fdopen(reads, "rb") as pipe:
        done = {int(line) for line in pipe}
    for file in filter(None, logs):
        file.close()
    return _exit_code(workers, failed, unresponsive, done, forwarded, run_dir if record else None)


def run_command(argv: Sequence[str]) -> int:
    """Run `python -m moetrain <argv>`, with the signals that come here passed on to it once; its exit code, negative for a signal."""
    workers: list[subprocess.Popen] = []
    with _forwarding(workers) as forwarded:
        workers.append(subprocess.Popen([sys.executable, "-m", "moetrain", *argv], stdin=subprocess.DEVNULL,
                                        env=program_environment(), process_group=0))
        if forwarded:
            workers[0].send_signal(forwarded[-1])
        return workers[0].wait()


def train_on_ranks(overrides: Sequence[str]) -> int:
    """`moetrain train <overrides>` on run.nproc ranks of this machine; the exit code. For Python programs, too."""
    config = compose(overrides)
    return with_restarts(lambda: start_ranks(["train", *overrides], config.run.nproc, run_dir(config)), config.run.max_restarts)


def with_restarts(attempt: Callable[[], int], restarts: int) -> int:
    """The exit code of `attempt`, made again up to `restarts` times as long as it says that a rank was lost (16).

    Every attempt resumes from the newest checkpoint; runs/attempts.py ends a run that gets no further.
    """
    code = attempt()
    for number in range(1, restarts + 1):
        if code != 16:
            break
        print(f"moetrain: restart {number} of {restarts}, from the newest checkpoint", file=sys.stderr)
        code = attempt()
    return code


def program_environment() -> dict[str, str]:
    """The environment of a process that runs `python -m moetrain`, as this one does.

    PYTHONSAFEPATH, because `-m` would put the current folder first: a file random.py there would run in place of the
    standard library's. PYTHONPATH stays, and has moetrain itself where that was only found in the current folder.
    """
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    if not any(metadata.Distribution.discover(name="moetrain", path=sys.path[1:])):
        root = str(Path(__file__).resolve().parents[2])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), root]))
    return environment


def _environment(nproc: int) -> dict[str, str]:
    threads = max(1, len(os.sched_getaffinity(0)) // nproc) if hasattr(os, "sched_getaffinity") else 1
    return {
        "OMP_NUM_THREADS": str(threads),
        **program_environment(),
        LAUNCHED: str(os.getpid()),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _forwarding(workers: list[subprocess.Popen]) -> AbstractContextManager[list[int]]:
    """Forward signals to the workers that still run; yields the numbers of those that came."""
    def send(number: int) -> None:
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(number)

    return forward_signals(send)


class WaitResult(NamedTuple):
    """How the ranks ended. silent: what is wrong with ranks that still ran when the time of the others was over."""

    failed: int | None                       # the rank that failed first
    unresponsive: dict[int, str]


def _wait(workers: list[subprocess.Popen]) -> WaitResult:
    """Until all have ended, or GRACE_S after one failed. One that saved and left does not hurry the others: they may be saving."""
    first = None
    deadline = float("inf")
    running = set(range(len(workers)))
    while running and time.monotonic() < deadline:
        for rank in sorted(running):
            code = workers[rank].poll()
            if code is None:
                continue
            running.discard(rank)
            if code and (first is None or workers[first].returncode == _SAVED != code):
                first = rank
                deadline = float("inf") if code == _SAVED else time.monotonic() + GRACE_S
        time.sleep(0.05)
    states = {rank: process_state(workers[rank].pid) for rank in running}
    stopped = {rank: f"is stopped (process {workers[rank].pid})" for rank in running if states[rank] in ("T", "t")}
    return WaitResult(first, stopped or {rank: f"does not answer (process {workers[rank].pid})" for rank in running})


def _exit_code(workers: list[subprocess.Popen], failed: int | None, unresponsive: dict[int, str], done: set[int], forwarded: list[int],
           run_dir: Path | None) -> int:
    """The exit code of ranks that have ended. Says what rank 0 could not say; run_dir: where status.json tells it, too."""
    left = [rank for rank, worker in enumerate(workers) if worker.returncode == 0 and rank not in done]
    code = workers[failed].returncode if failed is not None else _PEER if left else 0
    told = next((number for number in forwarded if code in (-number, 128 + number)), None)
    if told is not None:
        if run_dir is not None and workers[0].returncode < 0:
            _report(f"{signal.Signals(told).name} before there was anything new to save; the same command goes on", 128 + told, run_dir)
        return 128 + told
    reason, error = None, ""
    if code == _PEER and left:               # the others waited for it in vain, and it is the first to be blamed
        reason = f"rank {left[0]} left with 0 before its work was done; see {_output_of(left[0], run_dir)}"
    elif code == _PEER and unresponsive:
        rank, what = next(iter(unresponsive.items()))
        reason = f"rank {rank} {what}, and rank {failed} waited for it; see {_output_of(rank, run_dir)}"
    elif code < 0:
        reason = f"rank {failed} was ended by {signal.Signals(-code).name}; see {_output_of(failed, run_dir)}"
    elif code and workers[0].returncode != code:         # rank 0 has not said it itself
        reason = f"rank {failed} ended with code {code}; see {_output_of(failed, run_dir)}"
        error = _last_error(Path(_output_of(failed, run_dir)))
    code = _PEER if code < 0 else code
    if reason:
        _report(reason, code, run_dir)
    if error:
        print(error, file=sys.stderr)
    # Who told the run to stop does not want it started again.
    return 128 + forwarded[0] if forwarded and code == _PEER else code


def _stop(workers: list[subprocess.Popen]) -> None:
    running = [worker for worker in workers if worker.poll() is None]
    for worker in running:
        worker.terminate()
    deadline = time.monotonic() + TERM_S
    for worker in running:
        try:
            worker.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def _output_of(rank: int, run_dir: Path | None) -> str:
    """Where the output of a rank is."""
    return f"{Path(run_dir or '<run.dir>') / 'log' / f'rank-{rank}.log'}" if rank else "the output above"


def _report(reason: str, code: int, run_dir: Path | None) -> None:
    """One message about ranks whose own words are not on the terminal."""
    print(f"moetrain: {reason}", file=sys.stderr)
    if run_dir is not None:
        write_status(run_dir, code, reason)


def _last_error(log: Path) -> str:
    """The error that a log ends with; empty where other words do."""
    with suppress(OSError), open_regular(log) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _LOG_TAIL))
        found = re.search(r"^E-[A-Z]+-\d+  .*(\n  .*)*\s*\Z", file.read().decode(errors="replace"), re.MULTILINE)
        return found[0].rstrip() if found else ""
    return ""


