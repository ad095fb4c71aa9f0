"""Local ranks for run.nproc, and the record of how a run ended.

    train_on_ranks   what `moetrain train run.nproc=...` does
    start_ranks      one process per rank, as torchrun would start them on one node
    persist          start them again when one was lost, a few times
    ending           writes <run.dir>/status.json: code, reason, step

Rank 0 keeps the terminal; the others write <run.dir>/log/rank-N.log. No torch here.
"""

import ctypes
import json
import logging
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import IO, NamedTuple

from moetrain.config.compose import compose, run_dir
from moetrain.errors import ConfigError, DiskError, MoETrainError
from moetrain.files import create, open_regular, open_to_append, parse_json, reason
from moetrain.runs.lock import RunLock, process_state

# Seconds the other ranks get to end on their own after one failed, and then after SIGTERM.
GRACE_S = 10.0
TERM_S = 5.0

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_LAUNCHED = "MOETRAIN_LAUNCHED"          # set for ranks whose stderr is a log file of their own: the process that started them
_DONE = "MOETRAIN_DONE"                  # descriptor of a pipe to it: a rank that has done its work says so
_SAVED, _PEER = 10, 16                   # exit codes of a rank that was told to stop and saved, and of one that waited in vain
_LOG_TAIL = 1 << 16                      # bytes of a rank's log in which its last error is looked for
_PR_SET_PDEATHSIG = 1                    # <linux/prctl.h>
# What launchers set for a rank: a whole number.
_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")

log = logging.getLogger(__name__)


def is_worker() -> bool:
    """True in a process that torchrun or start_ranks made: it must not start ranks itself. ConfigError where that is not clear."""
    if "RANK" not in os.environ:
        return False
    for name in _NUMBERS:
        text = os.environ.get(name, "0")
        if not text.isdecimal():
            raise _wrong_environment(f"{name}={text}", ", ".join(dict.fromkeys([name, "RANK"])), f"RANK is set, so this would be a rank, and {name} is no number")
    if rank() >= int(os.environ.get("WORLD_SIZE", rank() + 1)):
        raise _wrong_environment(f"RANK={rank()} with WORLD_SIZE={os.environ['WORLD_SIZE']}", "RANK, WORLD_SIZE",
                                 "ranks are numbered from 0 to WORLD_SIZE - 1")
    return True


def _wrong_environment(what: str, where: str, why: str) -> ConfigError:
    return ConfigError(140, f"{what} in the environment", where=where, why=why,
                       next="unset RANK, and start ranks with run.nproc, torchrun or launch/node.sh, which set all of it")


def rank() -> int:
    text = os.environ.get("RANK", "0")
    return int(text) if text.isdecimal() else 0          # is_worker refuses it


def under_torchrun() -> bool:
    return "RANK" in os.environ and _LAUNCHED not in os.environ


def has_own_stderr() -> bool:
    """True where an error message disturbs nobody: rank 0, and ranks that write a log file."""
    return rank() == 0 or _LAUNCHED in os.environ


def become_rank() -> Callable[[], None]:
    """Prepare a process that a launcher started, before it does anything else. Returns what to call when its work is done.

    Ctrl-C ends it at once until there is something to save (train/preemption.py): Python's own handler would wait for the collective
    that the rank is in. A rank of `start_ranks` whose launcher is gone is told to save and leave: nobody would start it again.
    """
    if "RANK" in os.environ and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    _stay_with_launcher()
    pipe = os.environ.pop(_DONE, "")                     # not for processes that the rank starts
    if not pipe.isdecimal() or not stat.S_ISFIFO(os.fstat(int(pipe)).st_mode):
        return lambda: None
    os.set_inheritable(int(pipe), False)

    def done() -> None:
        with suppress(BrokenPipeError):
            os.write(int(pipe), f"{rank()}\n".encode())

    return done


def _stay_with_launcher() -> None:
    launcher = os.environ.get(_LAUNCHED)
    if launcher is None:
        return
    if sys.platform == "linux":                          # a rank that is stopped goes on when its launcher dies, and sees it
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGCONT), 0, 0, 0)

    def watch() -> None:
        while os.getppid() == int(launcher):
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="launcher", daemon=True).start()


def start_ranks(argv: Sequence[str], nproc: int, run_dir: Path, *, record: bool = True) -> int:
    """Run `python -m moetrain <argv>` on nproc ranks and wait for them.

    Returns 0, or the exit code of the rank that failed first: 16 when a signal killed it or it left without having done its
    work, 128 + signal when that signal was passed on from here. record: status.json says so too, where rank 0 could not.
    """
    logs = [None] + [_open_log(run_dir, rank) for rank in range(1, nproc)]
    reads, writes = os.pipe()
    common = {**_environment(nproc), _DONE: str(writes)}
    workers: list[subprocess.Popen] = []
    with _forwarding(workers) as passed_on:
        for rank, file in enumerate(logs):
            # A group of its own: Ctrl-C reaches a rank once, through us. It cannot read from the terminal.
            workers.append(subprocess.Popen(
                [sys.executable, "-m", "moetrain", *argv], stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, process_group=0, pass_fds=[writes]))
            if passed_on:                # a signal came while we were starting
                workers[-1].send_signal(passed_on[-1])
        try:
            failed, silent = _wait(workers)
        finally:
            _stop(workers)
    os.close(writes)
    with os.fdopen(reads, "rb") as pipe:
        done = {int(line) for line in pipe}
    for file in filter(None, logs):
        file.close()
    return _ended(workers, failed, silent, done, passed_on, run_dir if record else None)


def run_command(argv: Sequence[str]) -> int:
    """Run `python -m moetrain <argv>`, with the signals that come here passed on to it once; its exit code, negative for a signal."""
    workers: list[subprocess.Popen] = []
    with _forwarding(workers) as passed_on:
        workers.append(subprocess.Popen([sys.executable, "-m", "moetrain", *argv], stdin=subprocess.DEVNULL,
                                        env=program_environment(), process_group=0))
        if passed_on:
            workers[0].send_signal(passed_on[-1])
        return workers[0].wait()


def train_on_ranks(overrides: Sequence[str]) -> int:
    """`moetrain train <overrides>` on run.nproc ranks of this machine; the exit code. For Python programs, too."""
    config = compose(overrides)
    return persist(lambda: start_ranks(["train", *overrides], config.run.nproc, run_dir(config)), config.run.max_restarts)


def persist(attempt: Callable[[], int], restarts: int) -> int:
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


@contextmanager
def ending(run_dir: Path) -> Iterator[None]:
    """Write status.json when the block ends, on rank 0; a directory that does not exist is not made."""
    try:
        yield
    except MoETrainError as error:
        write_status(run_dir, error.code, str(error).splitlines()[0])
        if rank() and under_torchrun():              # rank 0 alone speaks on a shared terminal
            _note(run_dir, str(error))
        raise
    except (SystemExit, KeyboardInterrupt) as leaving:
        code = 128 + signal.SIGINT if isinstance(leaving, KeyboardInterrupt) else leaving.code
        if isinstance(code, int) and code > 128:
            leave_word(run_dir, code, f"{signal.Signals(code - 128).name} before there was anything new to save")
        else:
            write_status(run_dir, code, "another rank failed; log/rank-<n>.log says why")
        raise
    except Exception as error:
        write_status(run_dir, 1, f"{type(error).__name__}: {error}")
        raise
    write_status(run_dir, 0, "done")


def leave_word(run_dir: Path, code: int, reason: str) -> None:
    """Say and record why the process leaves without a save."""
    if has_own_stderr():
        print(f"moetrain: {reason}; the same command goes on from the newest save", file=sys.stderr, flush=True)
    write_status(run_dir, code, reason)


def write_status(run_dir: Path, code: int, reason: str) -> None:
    """Never raises: the error that is being reported matters more. Silent where another job is at work."""
    if rank() or not run_dir.is_dir() or RunLock(run_dir).holder():
        return
    draft = run_dir / "status.json.tmp"
    try:
        status = {"code": code, "reason": reason, "step": _last_step(run_dir)}
        with create(draft) as file:
            file.write(f"{json.dumps(status)}\n".encode())
        draft.replace(run_dir / "status.json")
    except OSError as error:
        log.warning("status.json could not be written: %s", error)


def _note(run_dir: Path, text: str) -> None:
    try:
        with _open_log(run_dir, rank()) as file:
            file.write(f"{text}\n".encode())
    except DiskError as error:
        log.warning("%s", error)


def program_environment() -> dict[str, str]:
    """The environment of a process that runs `python -m moetrain`, as this one does.

    PYTHONSAFEPATH, because `-m` would put the current folder first: a file random.py there would run in place of the
    standard library's. PYTHONPATH stays, and has moetrain itself where that was only found in the current folder.
    """
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    if not any(metadata.Distribution.discover(name="moetrain", path=sys.path[1:])):
        root = str(Path(__file__).resolve().parents[1])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), root]))
    return environment


def _environment(nproc: int) -> dict[str, str]:
    threads = max(1, len(os.sched_getaffinity(0)) // nproc) if hasattr(os, "sched_getaffinity") else 1
    return {
        "OMP_NUM_THREADS": str(threads),
        **program_environment(),
        _LAUNCHED: str(os.getpid()),
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


def _open_log(run_dir: Path, rank: int) -> IO[bytes]:
    path = run_dir / "log" / f"rank-{rank}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open_to_append(path)
    except OSError as error:
        raise DiskError(1, "the log of a rank cannot be written", where=str(path), why=reason(error),
                        next="run.dir=<a directory that can be written>") from error


@contextmanager
def _forwarding(workers: list[subprocess.Popen]) -> Iterator[list[int]]:
    """Pass signals on to the workers; yields the numbers of those that came."""
    passed_on: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        passed_on.append(number)
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(number)

    # A program may start ranks from another thread; Python lets the main thread alone handle signals.
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in _FORWARDED if main}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:            # nohup stays nohup
            signal.signal(number, pass_on)
    try:
        yield passed_on
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Waited(NamedTuple):
    """How the ranks ended. silent: what is wrong with ranks that still ran when the time of the others was over."""

    failed: int | None                       # the rank that failed first
    silent: dict[int, str]


def _wait(workers: list[subprocess.Popen]) -> Waited:
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
    return Waited(first, stopped or {rank: f"does not answer (process {workers[rank].pid})" for rank in running})


def _ended(workers: list[subprocess.Popen], failed: int | None, silent: dict[int, str], done: set[int], passed_on: list[int],
           run_dir: Path | None) -> int:
    """The exit code of ranks that have ended. Says what rank 0 could not say; run_dir: where status.json tells it, too."""
    left = [rank for rank, worker in enumerate(workers) if worker.returncode == 0 and rank not in done]
    code = workers[failed].returncode if failed is not None else _PEER if left else 0
    told = next((number for number in passed_on if code in (-number, 128 + number)), None)
    if told is not None:
        if run_dir is not None and workers[0].returncode < 0:
            _say(f"{signal.Signals(told).name} before there was anything new to save; the same command goes on", 128 + told, run_dir)
        return 128 + told
    reason, error = None, ""
    if code == _PEER and left:               # the others waited for it in vain, and it is the first to be blamed
        reason = f"rank {left[0]} left with 0 before its work was done; see {_output(left[0], run_dir)}"
    elif code == _PEER and silent:
        rank, what = next(iter(silent.items()))
        reason = f"rank {rank} {what}, and rank {failed} waited for it; see {_output(rank, run_dir)}"
    elif code < 0:
        reason = f"rank {failed} was ended by {signal.Signals(-code).name}; see {_output(failed, run_dir)}"
    elif code and workers[0].returncode != code:         # rank 0 has not said it itself
        reason = f"rank {failed} ended with code {code}; see {_output(failed, run_dir)}"
        error = _error_at_the_end(Path(_output(failed, run_dir)))
    code = _PEER if code < 0 else code
    if reason:
        _say(reason, code, run_dir)
    if error:
        print(error, file=sys.stderr)
    # Who told the run to stop does not want it started again.
    return 128 + passed_on[0] if passed_on and code == _PEER else code


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


def _output(rank: int, run_dir: Path | None) -> str:
    """Where the output of a rank is."""
    return f"{Path(run_dir or '<run.dir>') / 'log' / f'rank-{rank}.log'}" if rank else "the output above"


def _say(reason: str, code: int, run_dir: Path | None) -> None:
    """One message about ranks whose own words are not on the terminal."""
    print(f"moetrain: {reason}", file=sys.stderr)
    if run_dir is not None:
        write_status(run_dir, code, reason)


def _error_at_the_end(log: Path) -> str:
    """The error that a log ends with; empty where other words do."""
    with suppress(OSError), open_regular(log) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _LOG_TAIL))
        found = re.search(r"^E-[A-Z]+-\d+  .*(\n  .*)*\s*\Z", file.read().decode(errors="replace"), re.MULTILINE)
        return found[0].rstrip() if found else ""
    return ""


def _last_step(run_dir: Path) -> int:
    """The last step that metrics.jsonl reports, 0 before the first."""
    try:
        with open_regular(run_dir / "metrics.jsonl") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(parse_json(line)["step"])
        except (ValueError, KeyError, TypeError, OverflowError):
            continue                                 # a line that was cut off, or is damaged
    return 0
