"""Lock of a run's directory, so that one job at a time works in it.

Rank 0 holds <run.dir>/lock with flock, and the file names the holder. The kernel releases the lock when the
process ends, so on one machine there is never a stale lock to detect, whichever containers the jobs run in.
Host names and process ids, which two containers may share, decide nothing.

flock excludes all processes of a machine. It also excludes those of other machines on NFS (version 4, or 3
with lockd: Linux asks the server) and on parallel file systems that are mounted with it. Some mounts keep
locks local to a machine (nolock, localflock) or have none. Between machines the record in the file therefore
counts, too: its holder renews it every RENEW_S seconds, and the record of another machine (another boot id)
that stays unchanged for STALE_S belongs to a job that is gone. The clocks of machines are not compared, and a
date ahead of the file server's clock is not believed. On such mounts two jobs that start within the same
seconds on two machines do not see each other.
"""

import json
import os
import secrets
import shlex
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from moetrain.errors import ConfigError, DiskError
from moetrain.files import open_descriptor, open_regular, parse_json, read_bytes, reason
from moetrain.locks import is_at, try_lock

RENEW_S = 5.0
STALE_S = 45.0
RETRY_S = 1.0             # time limit of taking the lock: `holder` in another process locks it for a moment
_MAX_RECORD = 4096           # bytes


class Holder(NamedTuple):
    """The holder of a lock, as the file records it. Fields that are missing there keep their defaults."""

    machine: str = ""        # boot id of the kernel, the same in all its containers
    host: str = "?"
    pid: int = 0
    command: str = "?"
    since: str = "an unknown time"
    token: str = ""          # random, unique to this holder


class RunLock:
    """Lock of a run's directory, held while entered."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "lock"
        self._token = secrets.token_hex(8)
        self._leaving = threading.Event()

    def __enter__(self) -> "RunLock":
        """Take the lock; ConfigError when another job works in the directory.

        A job on this machine is known at once. For one on another machine the
        record is watched for up to STALE_S.
        """
        self._descriptor, is_locked = self._open_locked()
        try:
            before = self._record()
            if before and (before.machine != _boot_id() or not is_locked) and self._is_renewed():
                raise _held_error(self.path, before)
            own = Holder(
                _boot_id(), socket.gethostname(), os.getpid(), _shortened(sys.orig_argv), _now(), self._token)
            length = os.pwrite(self._descriptor, json.dumps(own._asdict()).encode(), 0)
            os.ftruncate(self._descriptor, length)
        except BaseException:
            os.close(self._descriptor)
            raise
        _OWN_TOKENS.add(self._token)
        threading.Thread(target=self._renew, name="lock", daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._leaving.set()
        with suppress(OSError):
            self.path.unlink()  # while the lock is held: the next job sees that its file is gone (`is_at`)
        os.close(self._descriptor)
        _OWN_TOKENS.discard(self._token)

    def holder(self) -> Holder | None:
        """The other process that works in the directory now; None without one."""
        try:
            held, descriptor = self._record(), open_descriptor(self.path, os.O_RDONLY)
        except OSError:
            return None
        if held is None or held.token in _OWN_TOKENS:
            os.close(descriptor)
            return None
        try:
            if not try_lock(descriptor, shared=True):
                return held
            is_gone = held.machine == _boot_id()
        except OSError:  # the file system has no locks
            is_gone = False
        finally:
            os.close(descriptor)
        return None if is_gone or not 0 <= self._age_s() <= STALE_S else held

    def _open_locked(self) -> tuple[int, bool]:
        """Open and lock the file. Returns its descriptor, and False where the file system has no locks."""
        deadline = time.monotonic() + RETRY_S
        while True:
            try:
                descriptor = open_descriptor(self.path, os.O_RDWR | os.O_CREAT)
            except OSError as error:
                raise DiskError(31, "the run cannot be locked", where=str(self.path), why=reason(error),
                                next="make it a file that can be written, or choose another run.name"
                                ) from error
            try:
                held = try_lock(descriptor)
            except OSError:
                return descriptor, False
            if held and is_at(descriptor, self.path):
                return descriptor, True
            os.close(descriptor)
            if not held and time.monotonic() > deadline:
                raise _held_error(self.path, self._record() or Holder())
            time.sleep(0.02)

    def _is_renewed(self) -> bool:
        """Whether the holder renews the record within STALE_S; False at once where it is older than that."""
        before, until = self._last_renewal(), time.monotonic() + STALE_S
        while self._age_s() <= STALE_S and time.monotonic() < until:
            time.sleep(RENEW_S / 5)
            if self._last_renewal() != before:
                return True
        return False

    def _record(self) -> Holder | None:
        """The record in the file; None where it is empty or missing. One that is damaged names no holder."""
        try:
            text = read_bytes(self.path, limit=_MAX_RECORD)
            content = parse_json(text) if text.strip() else None
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            return Holder()
        if content is None:
            return None
        fits = isinstance(content, dict) and all(
            type(content.get(name)) is type(value) for name, value in Holder()._asdict().items())
        return Holder(**{name: content[name] for name in Holder._fields}) if fits else Holder()

    def _last_renewal(self) -> tuple[Holder | None, int]:
        """The record and the time of its last renewal, in nanoseconds.

        The file is opened anew each time, so that an NFS client asks the server instead of its cache.
        """
        try:
            with open_regular(self.path) as file:
                return self._record(), os.fstat(file.fileno()).st_mtime_ns
        except OSError:
            return None, 0

    def _age_s(self) -> float:
        """Seconds since the record was renewed.

        A second file is created and the dates of both are compared, so that one clock
        writes both: the file server's.
        """
        probe = self.path.with_name(f"lock.{self._token}")
        try:
            probe.touch()
            return (probe.stat().st_mtime_ns - self._last_renewal()[1]) / 1e9
        except OSError:
            return 0.0
        finally:
            probe.unlink(missing_ok=True)

    def _renew(self) -> None:
        """Renew the record every RENEW_S until the lock is released; runs in a thread."""
        while not self._leaving.wait(RENEW_S):
            with suppress(OSError):  # the folder is gone or full: the next save reports it
                os.utime(self.path)


_OWN_TOKENS: set[str] = set()  # tokens of the locks that this process holds


def _held_error(path: Path, held: Holder) -> ConfigError:
    here = held.machine == _boot_id()
    state = ", and is stopped" if here and _is_stopped(held) else ""
    return ConfigError(
        91, f"another job is at work in {path.parent}", where=str(path),
        why=f"process {held.pid} on {held.host} ({held.command}) holds it since {held.since}{state}",
        next=f"wait for it; end it with kill {'-KILL ' if state else ''}{held.pid}"
             f"{'' if here else f' on {held.host}'}; or choose another run.name")


def _is_stopped(held: Holder) -> bool:
    """Whether the holder is a process visible in /proc here that is stopped (SIGSTOP, Ctrl-Z, a debugger)."""
    with suppress(OSError):
        words = Path(f"/proc/{held.pid}/cmdline").read_bytes().decode(
            errors="replace").rstrip("\0").split("\0")
        return _shortened(words) == held.command and process_state(held.pid) in ("T", "t")
    return False


def process_state(pid: int) -> str:
    """The kernel's letter for the state of a process: R runs, S sleeps, T or t is stopped.

    Empty where there is no such process, or no /proc.
    """
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][:1]
    return ""


def _boot_id() -> str:
    """Identify the machine by the boot id of its kernel, the same in all its containers.

    Without /proc it is the host's name.
    """
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


def _shortened(words: Sequence[str]) -> str:
    text = shlex.join(words)
    return text if len(text) <= 300 else text[:299] + "…"


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")
