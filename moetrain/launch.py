"""Local ranks for run.nproc, and the record of how a run ended.

    train_on_ranks   what `moetrain train run.nproc=...` does
    start_ranks      one process per rank, as torchrun would start them on one node
    persist          start them again when one was lost, a few times
    ending           writes <run.dir>/status.json: code, reason, step

Rank 0 keeps the terminal; the others write <run.dir>/log/rank-N.log. No torch here.
"""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import IO

from moetrain.config.compose import compose, run_dir
from moetrain.errors import DiskError, MoETrainError
from moetrain.files import create, open_regular, open_to_append, parse_json, reason
from moetrain.train.tenancy import Tenancy

# Seconds the other ranks get to end on their own after one failed, and then after SIGTERM.
GRACE_S = 10.0
TERM_S = 5.0

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_LAUNCHED = "MOETRAIN_LAUNCHED"          # set for ranks whose stderr is a log file of their own: the process that started them
_SAVED = 10                              # exit code of a rank that was told to stop and saved

log = logging.getLogger(__name__)


def is_worker() -> bool:
    """True in a process that torchrun or start_ranks made: it must not start ranks itself."""
    return "RANK" in os.environ


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def under_torchrun() -> bool:
    return is_worker() and _LAUNCHED not in os.environ


def has_own_stderr() -> bool:
    """True where an error message disturbs nobody: rank 0, and ranks that write a log file."""
    return rank() == 0 or _LAUNCHED in os.environ


def stay_with_launcher() -> None:
    """A rank of `start_ranks` whose launcher is gone is told to save and leave: nobody would start it again."""
    launcher = os.environ.get(_LAUNCHED)
    if launcher is None:
        return

    def watch() -> None:
        while os.getppid() == int(launcher):
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="launcher", daemon=True).start()


def start_ranks(argv: Sequence[str], nproc: int, run_dir: Path, *, record: bool = True) -> int:
    """Run `python -m moetrain <argv>` on nproc ranks and wait for them.

    Returns 0, or the exit code of the rank that failed first: 16 when a signal killed it, 128 + signal when that
    signal was passed on from here. record: status.json says so too, where rank 0 could not.
    """
    logs = [None] + [_open_log(run_dir, rank) for rank in range(1, nproc)]
    common = _environment(nproc)
    workers = []
    with _forwarding(workers) as passed_on:
        for rank, file in enumerate(logs):
            # A group of its own: Ctrl-C reaches a rank once, through us. It cannot read from the terminal.
            workers.append(subprocess.Popen(
                [sys.executable, "-m", "moetrain", *argv], stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, process_group=0))
            if passed_on:                # a signal came while we were starting
                workers[-1].send_signal(passed_on[-1])
        try:
            failed = _wait(workers)
        finally:
            _stop(workers)
    for file in filter(None, logs):
        file.close()
    if failed is None:
        return 0
    code = workers[failed].returncode
    if any(code in (-number, 128 + number) for number in passed_on):
        return 128 - code if code < 0 else code
    if code < 0 or workers[0].returncode != code:    # rank 0 has not said it itself
        _tell(failed, code, run_dir, record)
    return 16 if code < 0 else code


def train_on_ranks(overrides: Sequence[str]) -> int:
    """`moetrain train <overrides>` on run.nproc ranks of this machine; the exit code. For Python programs, too."""
    config = compose(overrides)
    return persist(lambda: start_ranks(["train", *overrides], config.run.nproc, run_dir(config)), config.run.max_restarts)


def persist(attempt: Callable[[], int], restarts: int) -> int:
    """The exit code of `attempt`, made again up to `restarts` times as long as it says that a rank was lost (16).

    Every attempt resumes from the newest checkpoint; train/tenancy.py ends a run that gets no further.
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
    except SystemExit as leaving:
        told = isinstance(leaving.code, int) and leaving.code > 128
        write_status(run_dir, leaving.code, f"{signal.Signals(leaving.code - 128).name} while the run started" if told else
                     "another rank failed; log/rank-<n>.log says why")
        raise
    except KeyboardInterrupt:
        write_status(run_dir, 128 + signal.SIGINT, "interrupted")
        raise
    except Exception as error:
        write_status(run_dir, 1, f"{type(error).__name__}: {error}")
        raise
    write_status(run_dir, 0, "done")


def write_status(run_dir: Path, code: int, reason: str) -> None:
    """Never raises: the error that is being reported matters more. Silent where another job is at work."""
    if rank() or not run_dir.is_dir() or Tenancy(run_dir).holder():
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


def _wait(workers: list[subprocess.Popen]) -> int | None:
    """The rank that failed first, or None. One that saved and left does not hurry the others: they may be saving."""
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
    return first


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


def _tell(rank: int, code: int, run_dir: Path, record: bool) -> None:
    """One message about a rank whose own words are not on the terminal."""
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    place = run_dir / "log" / f"rank-{rank}.log" if rank else "the output above"
    reason = f"rank {rank} {how}; see {place}"
    print(f"moetrain: {reason}", file=sys.stderr)
    if record:
        write_status(run_dir, 16 if code < 0 else code, reason)


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
