"""The lock of a run's directory: one job works in it.

<run.dir>/lock is held locked (flock) by rank 0 and says who that is. The kernel lets go when the process ends, so on one machine
there is no stale lock to judge or to take over, whichever containers the jobs are in: it neither asks for a host's name nor for a
process id, which two containers may share.

What is relied on: flock excludes all processes of a machine, and those of other machines on NFS (4, or 3 with lockd; Linux asks the
server) and on parallel file systems mounted with it. A mount that keeps locks to the machine (nolock, localflock), or has none, is why
the record counts between machines: its holder renews it every BEAT_S, and one that another machine left (another boot id) without
a change for STALE_S is of a job that is gone. Clocks of machines are not compared, and a date ahead of the file server's clock is
not believed. There two jobs that start within the same seconds on two machines are not told apart.
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
RETRY_S = 1.0             # for who only looks whether it is held
_MAX_RECORD = 4096              # bytes of a record


class Holder(NamedTuple):
    """What a lock says of who holds it. Fields that it does not say are empty."""

    machine: str = ""        # boot id of the kernel, which containers share
    host: str = "?"
    pid: int = 0
    command: str = "?"
    since: str = "an unknown time"
    token: str = ""          # of this holder alone


class RunLock:
    """Held while entered."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "lock"
        self._token = secrets.token_hex(8)
        self._leaving = threading.Event()

    def __enter__(self) -> "RunLock":
        """ConfigError when another job is at work here: at once on this machine, else after up to STALE_S of looking for signs of life."""
        self._descriptor, is_locked = self._open_locked()
        try:
            before = self._record()
            if before and (before.machine != _boot_id() or not is_locked) and self._is_renewed():
                raise _held_error(self.path, before)
            own = Holder(_boot_id(), socket.gethostname(), os.getpid(), _shortened(sys.orig_argv), _now(), self._token)
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
            self.path.unlink()                           # while it is held: who locks it next sees that it is gone (is_at)
        os.close(self._descriptor)
        _OWN_TOKENS.discard(self._token)

    def holder(self) -> Holder | None:
        """Who works here now, if it is another process."""
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
        except OSError:                                  # no locks here
            is_gone = False
        finally:
            os.close(descriptor)
        return None if is_gone or not 0 <= self._age_s() <= STALE_S else held

    def _open_locked(self) -> tuple[int, bool]:
        """The open file, and whether it is locked: False where the file system has no locks."""
        deadline = time.monotonic() + RETRY_S
        while True:
            try:
                descriptor = open_descriptor(self.path, os.O_RDWR | os.O_CREAT)
            except OSError as error:
                raise DiskError(31, "the run cannot be locked", where=str(self.path), why=reason(error),
                                next="make it a file that can be written, or choose another run.name") from error
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
        """Whether somebody renews the record within STALE_S; not even looked for where it is older than that."""
        before, until = self._last_renewal(), time.monotonic() + STALE_S
        while self._age_s() <= STALE_S and time.monotonic() < until:
            time.sleep(RENEW_S / 5)
            if self._last_renewal() != before:
                return True
        return False

    def _record(self) -> Holder | None:
        """What the file says; None where it says nothing. What is no record names nobody."""
        try:
            text = read_bytes(self.path, limit=_MAX_RECORD)
            content = parse_json(text) if text.strip() else None
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            return Holder()
        if content is None:
            return None
        fits = isinstance(content, dict) and all(type(content.get(name)) is type(value) for name, value in Holder()._asdict().items())
        return Holder(**{name: content[name] for name in Holder._fields}) if fits else Holder()

    def _last_renewal(self) -> tuple[Holder | None, int]:
        """The record and when it was renewed. Opened anew: NFS then asks the server instead of its own memory."""
        try:
            with open_regular(self.path) as file:
                return self._record(), os.fstat(file.fileno()).st_mtime_ns
        except OSError:
            return None, 0

    def _age_s(self) -> float:
        """Seconds since the record was renewed, by the clock that writes the dates of both files."""
        probe = self.path.with_name(f"lock.{self._token}")
        try:
            probe.touch()
            return (probe.stat().st_mtime_ns - self._last_renewal()[1]) / 1e9
        except OSError:
            return 0.0
        finally:
            probe.unlink(missing_ok=True)

    def _renew(self) -> None:
        while not self._leaving.wait(RENEW_S):
            with suppress(OSError):                      # the folder is gone or full: the save will say so
                os.utime(self.path)


_OWN_TOKENS: set[str] = set()      # tokens of the locks that this process holds


def _held_error(path: Path, held: Holder) -> ConfigError:
    here = held.machine == _boot_id()
    state = ", and is stopped" if here and _is_stopped(held) else ""
    return ConfigError(
        91, f"another job is at work in {path.parent}", where=str(path),
        why=f"process {held.pid} on {held.host} ({held.command}) holds it since {held.since}{state}",
        next=f"wait for it; end it with kill {'-KILL ' if state else ''}{held.pid}{'' if here else f' on {held.host}'}; or choose another run.name")


def _is_stopped(held: Holder) -> bool:
    """Whether the holder is a process that can be seen from here and is stopped (SIGSTOP, Ctrl-Z, a debugger)."""
    with suppress(OSError):
        words = Path(f"/proc/{held.pid}/cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
        return _shortened(words) == held.command and process_state(held.pid) in ("T", "t")
    return False


def process_state(pid: int) -> str:
    """The kernel's letter for what a process does: R runs, S sleeps, T or t is stopped. Empty where there is none, or no /proc."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][:1]
    return ""


def _boot_id() -> str:
    """One boot of one kernel, whatever its hosts and containers are called; without /proc the host's name."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


def _shortened(words: Sequence[str]) -> str:
    text = shlex.join(words)
    return text if len(text) <= 300 else text[:299] + "…"


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")
