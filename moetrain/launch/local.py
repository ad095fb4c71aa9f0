"""Start the ranks of a run on this machine (run.nproc) and wait for them.

    train_on_ranks   what `moetrain train run.nproc=...` does
    start_ranks      one process per rank, as torchrun would start them on one node
    with_restarts    start them again when one was lost, up to run.max_restarts times

Rank 0 keeps the terminal; the others write to <run.dir>/log/rank-N.log. This file imports no torch.
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
from pathlib import Path
from site import getsitepackages, getusersitepackages
from typing import NamedTuple

from moetrain import packages
from moetrain.config.compose import compose, run_dir
from moetrain.files import open_regular
from moetrain.launch.program import MOETRAIN, Program
from moetrain.launch.rank import DONE, LAUNCHED
from moetrain.launch.signals import forward_signals
from moetrain.launch.status import open_log, write_status
from moetrain.runs.lock import process_state

# Seconds that the other ranks have to end on their own after one failed, and then after SIGTERM.
GRACE_S = 10.0
TERM_S = 5.0

# Exit codes of a rank that saved because it was told to stop, and of one whose peer was lost.
_SAVED, _PEER = 10, 16
_LOG_TAIL = 1 << 16  # bytes of a rank's log that are searched for its last error


def start_ranks(argv: Sequence[str], nproc: int, run_dir: Path, *, record: bool = True,
                program: Program = Program()) -> int:
    """Run a program, `python -m moetrain <argv>` unless another is given, on nproc ranks and wait for them.

    Args:
        argv: verb and overrides.
        nproc: number of ranks.
        run_dir: directory of the run, for the log files of the ranks.
        record: write status.json where rank 0 could not.
        program: what the ranks run.

    Returns:
        0, or the exit code of the rank that failed first: 16 when a signal killed it or it exited before its
        work was done, 128 + signal when that signal was forwarded from here.
    """
    words = program.words([*argv])
    logs = [None] + [open_log(run_dir, rank) for rank in range(1, nproc)]
    reads, writes = os.pipe()
    common = {**_environment(nproc, program), DONE: str(writes)}
    workers: list[subprocess.Popen] = []
    with _forwarding(workers) as forwarded:
        for rank, file in enumerate(logs):
            # In a process group of its own a rank gets Ctrl-C once, from here,
            # and cannot read from the terminal.
            workers.append(subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=file, stderr=file, process_group=0,
                env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, pass_fds=[writes]))
            if forwarded:  # a signal came while the ranks were being started
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


def run_command(argv: Sequence[str], program: Program = Program()) -> int:
    """Run a program, `python -m moetrain <argv>` unless another is given; forward each signal to it once.

    Returns its exit code, which is negative where a signal ended it.
    """
    words = program.words([*argv])
    workers: list[subprocess.Popen] = []
    with _forwarding(workers) as forwarded:
        workers.append(subprocess.Popen(
            words, stdin=subprocess.DEVNULL, env=program_environment(program), process_group=0))
        if forwarded:
            workers[0].send_signal(forwarded[-1])
        return workers[0].wait()


def train_on_ranks(overrides: Sequence[str], program: Program = Program()) -> int:
    """Run `moetrain train <overrides>` on run.nproc ranks of this machine; returns the exit code.

    Python programs may call it, too. The ranks know nothing of what such a program has defined: one with a
    `convert_model` calls `main` (moetrain/__main__.py).
    """
    config = compose(overrides)
    return with_restarts(lambda: start_ranks(["train", *overrides], config.run.nproc, run_dir(config),
                                             program=program), config.run.max_restarts)


def with_restarts(attempt: Callable[[], int], restarts: int) -> int:
    """Call `attempt`, and again up to `restarts` times while it returns 16: a rank was lost.

    Every attempt resumes from the newest checkpoint; runs/attempts.py ends a run that gets no further.
    Returns the exit code of the last attempt.
    """
    code = attempt()
    for number in range(1, restarts + 1):
        if code != 16:
            break
        print(f"moetrain: restart {number} of {restarts}, from the newest checkpoint", file=sys.stderr)
        code = attempt()
    return code


def program_environment(program: Program = Program()) -> dict[str, str]:
    """Environment variables for a process that runs a program, usually `python -m moetrain`.

    For moetrain PYTHONSAFEPATH is set, because `-m` puts the current folder first on the path: a random.py
    there would replace the standard library's. A user's own program finds its imports as this process did.
    PYTHONPATH is kept, and names those folders of allowed packages (packages.py) to which only the current
    folder or that of a script had led, and moetrain's own folder unless it is one of Python's: another
    moetrain may be installed.
    """
    environment, roots = dict(os.environ), packages.roots_to_pass_on()
    if program.command == MOETRAIN:
        environment["PYTHONSAFEPATH"] = "1"
    root = Path(__file__).resolve().parents[2]
    if root not in {Path(folder).resolve() for folder in (*getsitepackages(), getusersitepackages())}:
        roots.append(str(root))
    if roots:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), *roots]))
    return environment


def _environment(nproc: int, program: Program) -> dict[str, str]:
    """What all ranks of this machine share; RANK and LOCAL_RANK are added for each."""
    threads = max(1, len(os.sched_getaffinity(0)) // nproc) if hasattr(os, "sched_getaffinity") else 1
    return {
        "OMP_NUM_THREADS": str(threads),
        **program_environment(program),
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
    """How the ranks ended."""

    failed: int | None            # the rank that failed first
    unresponsive: dict[int, str]  # ranks that still ran when the time limit was over: what is wrong with each


def _wait(workers: list[subprocess.Popen]) -> WaitResult:
    """Wait until all ranks have ended, or GRACE_S after one failed.

    A rank that saved and left sets no time limit: the others may still be saving.
    """
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
    stopped = {rank: f"is stopped (process {workers[rank].pid})"
               for rank in running if states[rank] in ("T", "t")}
    return WaitResult(first, stopped or {
        rank: f"does not answer (process {workers[rank].pid})" for rank in running})


def _exit_code(workers: list[subprocess.Popen], failed: int | None, unresponsive: dict[int, str],
               done: set[int], forwarded: list[int], run_dir: Path | None) -> int:
    """Decide the exit code of ranks that have ended, and report a failure that rank 0 could not report.

    Args:
        workers: processes of the ranks, all ended.
        failed: the rank that failed first.
        unresponsive: ranks that had to be ended, and what was wrong with each.
        done: ranks that said that their work was done.
        forwarded: signals that the ranks were sent, in order.
        run_dir: where to write status.json; None writes none.
    """
    left = [rank for rank, worker in enumerate(workers) if worker.returncode == 0 and rank not in done]
    code = workers[failed].returncode if failed is not None else _PEER if left else 0
    ending_signal = next((number for number in forwarded if code in (-number, 128 + number)), None)
    if ending_signal is not None:
        if run_dir is not None and workers[0].returncode < 0:
            _report(f"{signal.Signals(ending_signal).name} before there was anything new to save; "
                    "the same command goes on", 128 + ending_signal, run_dir)
        return 128 + ending_signal
    reason, error, output = None, "", _output_of(failed or 0, run_dir)
    if code == _PEER and left:  # the others failed because they waited for this rank
        reason = f"rank {left[0]} left with 0 before its work was done; see {_output_of(left[0], run_dir)}"
    elif code == _PEER and unresponsive:
        rank, what = next(iter(unresponsive.items()))
        reason = f"rank {rank} {what}, and rank {failed} waited for it; see {_output_of(rank, run_dir)}"
    elif code < 0:
        reason = f"rank {failed} was ended by {signal.Signals(-code).name}; see {output}"
    elif code and workers[0].returncode != code:  # rank 0 has not reported it itself
        reason = f"rank {failed} ended with code {code}; see {output}"
        error = _last_error(Path(output))
    code = _PEER if code < 0 else code
    if reason:
        _report(reason, code, run_dir)
    if error:
        print(error, file=sys.stderr)
    # A run that was told to stop must not be started again, so it does not end with _PEER.
    return 128 + forwarded[0] if forwarded and code == _PEER else code


def _stop(workers: list[subprocess.Popen]) -> None:
    """End the ranks that still run: SIGTERM, and SIGKILL after TERM_S."""
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
    """Where the output of a rank is, for a message."""
    return f"{Path(run_dir or '<run.dir>') / 'log' / f'rank-{rank}.log'}" if rank else "the output above"


def _report(reason: str, code: int, run_dir: Path | None) -> None:
    """Report a failure of ranks whose own messages are not on the terminal."""
    print(f"moetrain: {reason}", file=sys.stderr)
    if run_dir is not None:
        write_status(run_dir, code, reason)


def _last_error(log: Path) -> str:
    """The error message at the end of a log file; empty where it ends in something else."""
    with suppress(OSError), open_regular(log) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _LOG_TAIL))
        found = re.search(
            r"^E-[A-Z]+-\d+  .*(\n  .*)*\s*\Z", file.read().decode(errors="replace"), re.MULTILINE)
        return found[0].rstrip() if found else ""
    return ""


