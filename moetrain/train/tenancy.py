"""Who works on a run's directory, and how often they failed there: rank 0's business.

    lock                  <run.dir>/lock: host, process, a sign of life every few seconds; a second job is refused
    log/attempts.jsonl    one line a start, one line an end: a run that crashes again and again at one step is stopped (17)

A lock is stale when its process is gone, or, on another host, when it has shown no sign of life for `STALE_S`.
"""

import json
import os
import socket
import threading
import time
from pathlib import Path
from types import TracebackType

from moetrain.errors import ConfigError, CrashLoopError

BEAT_S = 5.0
STALE_S = 45.0
CRASHES = 3
# Ends that say nothing against a further attempt: done, preempted, a user's mistake, told to stop. The rest are crashes.
ORDERLY = {0, 2, 10, 11, 12, 13, 14, 15, 18}


# Who holds a lock that does not say.
NOBODY = {"host": "?", "pid": 0, "born": "", "since": "an unknown time"}


class Tenancy:
    """Holds the lock of a run's directory while entered, and keeps the record of attempts."""

    def __init__(self, directory: Path) -> None:
        self.lock = directory / "lock"
        self.attempts = directory / "log" / "attempts.jsonl"
        self.status = directory / "status.json"

    def holder(self) -> dict | None:
        """Who holds the lock now, if it is another process that is alive."""
        held = self._held()
        return None if held is None or held["pid"] == os.getpid() or self._stale(held) else held

    def __enter__(self) -> "Tenancy":
        """ConfigError when somebody else is at work here. Waits up to STALE_S for a sign of life from another host."""
        deadline = time.monotonic() + STALE_S + BEAT_S
        while not self._take():
            before = self._held()
            if before is None:
                continue                                 # released in this moment
            if before["host"] == socket.gethostname() or time.monotonic() > deadline or self._beats(before):
                raise ConfigError(
                    91, f"another job is at work in {self.lock.parent}", where=str(self.lock),
                    why=f"process {before['pid']} on {before['host']} holds it since {before['since']}",
                    next="wait for it, stop it, or choose another run.name",
                )
        self._leaving = threading.Event()
        threading.Thread(target=self._beat, name="lock", daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._leaving.set()
        self.lock.unlink(missing_ok=True)

    def begin(self, step: int) -> None:
        """An attempt starts from this step. CrashLoopError after CRASHES attempts that crashed without getting further."""
        crashed = self._crashed(step)
        if crashed >= CRASHES:
            raise CrashLoopError(
                1, f"the run crashed {crashed} times in a row after step {step} without reaching the next save",
                where=str(self.attempts), why="the same would happen again; log/rank-<n>.log and status.json say what it was",
                next=f"mend the cause, then remove {self.attempts} and run the same command",
            )
        self.status.unlink(missing_ok=True)              # how an earlier attempt ended says nothing now
        self._note({"start": step, "pid": os.getpid(), "host": socket.gethostname(), "time": _now()})

    def end(self, code: int) -> None:
        self._note({"end": code, "time": _now()})

    def _crashed(self, step: int) -> int:
        """Attempts in a row, the newest last, that started from this step and did not end orderly."""
        count, orderly = 0, False
        for line in reversed(_lines(self.attempts)):
            if "end" in line:
                orderly = line["end"] in ORDERLY or isinstance(line["end"], int) and line["end"] > 128
            elif line.get("start") != step or orderly:
                break
            else:
                count += 1
        return count

    def _note(self, record: dict) -> None:
        self.attempts.parent.mkdir(parents=True, exist_ok=True)
        with self.attempts.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def _take(self) -> bool:
        """Make the lock; a stale one is moved aside first."""
        held = self._held()
        if held is not None and self._stale(held):
            aside = self.lock.with_name(f"lock.{os.getpid()}")
            try:
                self.lock.rename(aside)
                aside.unlink()
            except FileNotFoundError:
                pass                                     # somebody else was quicker
        try:
            descriptor = os.open(self.lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump({"host": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid()), "since": _now()}, file)
        return True

    def _held(self) -> dict | None:
        """What the lock says; None when there is none. One that is being written, or is damaged, names nobody."""
        try:
            text = self.lock.read_text(encoding="utf-8")
            held = json.loads(text) if text.strip() else {**NOBODY, "since": "now"}
        except FileNotFoundError:
            return None
        except ValueError:
            return NOBODY
        fits = isinstance(held, dict) and all(type(held.get(key)) is type(value) for key, value in NOBODY.items())
        return held if fits else NOBODY

    def _stale(self, held: dict) -> bool:
        if held["host"] == socket.gethostname():
            return _born(held["pid"]) != held["born"]
        try:
            return time.time() - self.lock.stat().st_mtime > STALE_S
        except FileNotFoundError:
            return True

    def _beats(self, held: dict) -> bool:
        """Whether the holder on another host shows a sign of life within two beats."""
        before = _changed(self.lock)
        time.sleep(2 * BEAT_S)
        return _changed(self.lock) not in (before, None) and self._held() == held

    def _beat(self) -> None:
        while not self._leaving.wait(BEAT_S):
            try:
                os.utime(self.lock)
            except OSError:
                pass                                     # the directory is gone or full: the save will say so


def _born(pid: int) -> str:
    """When a process of this host started, in the kernel's own count; empty when there is none. Numbers are used again."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]           # dead, and nobody has asked how it ended
    except (OSError, IndexError):
        pass
    try:                                                 # no /proc: alive or not is all that can be known
        os.kill(pid, 0)
        return "alive"
    except (OSError, OverflowError):
        return ""


def _changed(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None


def _lines(path: Path) -> list[dict]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue                                     # a line that was cut off
    return [line for line in found if isinstance(line, dict)]


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")
