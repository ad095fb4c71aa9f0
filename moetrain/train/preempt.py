"""Told to stop: SIGTERM and SIGUSR1 save at the next step's end and leave with code 10.

    first signal         `requested` is set; the loop puts it to the vote of the step (train/step.py), so that all ranks save
                         and leave after the same step, whichever of them were told
    second signal        leaves at once, without a save
    run.grace_s is over  the same: whoever told us will not wait longer
    while the run starts the same: there is nothing to save

A thread watches: a rank that waits for others inside a collective cannot run Python's signal handlers, but the interpreter's
C handler writes the signal's number to a pipe at any time.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from moetrain.errors import Preempted

ECHO_S = 1.0    # Slurm signals every process of a step, and the launcher passes the same signal on
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def in_main_thread() -> bool:
    """Python lets the main thread alone handle signals. A program that trains in another one says itself what stops it."""
    return threading.current_thread() is threading.main_thread()


class Early:
    """The handler of `told_early`. told: the signal, for Python passes over what is raised inside callbacks of imports or of memory."""

    told: int | None = None

    def __call__(self, number: int, frame: object) -> None:
        self.told = number
        raise SystemExit(128 + number)


@contextmanager
def told_early() -> Iterator[None]:
    """While a run starts there is nothing to save: the first signal leaves in order, by SystemExit with 128 + its number."""
    leave = Early()
    before = {number: signal.signal(number, leave) for number in SIGNALS if in_main_thread()}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is leave:        # Preemption may have set its own
                signal.signal(number, handler)


class Preemption:
    """While it is entered, signals ask for a save; in another thread than the main one they do not.

    grace_s: seconds between the first signal and leaving without a save; None waits as long as it takes.
    leaving: called with the code and a reason before the process goes without a save.
    """

    def __init__(self, *, grace_s: float | None, leaving: Callable[[int, str], None]) -> None:
        self.grace_s, self.leaving = grace_s, leaving
        self.requested: signal.Signals | None = None

    def __enter__(self) -> "Preemption":
        for handler in map(signal.getsignal, SIGNALS):
            if isinstance(handler, Early) and handler.told:
                raise SystemExit(128 + handler.told)
        self._entered = in_main_thread()
        if not self._entered:
            return self
        self._reads, self._writes = socket.socketpair()
        self._writes.setblocking(False)
        self._before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        self._wakeup = signal.set_wakeup_fd(self._writes.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="preemption", daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._entered:
            return
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():     # another node's signal may come after the vote
            signal.signal(number, signal.SIG_IGN if kind is Preempted else handler)
        self._writes.close()                             # ends the thread

    def _watch(self) -> None:
        try:
            while numbers := self._reads.recv(16):
                for number in numbers:
                    if number in SIGNALS:
                        self._told(signal.Signals(number))
        except TimeoutError:
            self._leave(f"{self.requested.name} came {self.grace_s:g} s ago and the save is not done")
        finally:
            self._reads.close()

    def _told(self, number: signal.Signals) -> None:
        if self.requested is not None and time.monotonic() < self._told_at + ECHO_S:
            return
        if self.requested is not None:
            self._leave(f"{number.name} came after {self.requested.name}: left at once, without a save")
        self.requested, self._told_at = number, time.monotonic()
        self._reads.settimeout(None if self.grace_s is None else max(self.grace_s, 1e-3))     # 0 would not wait at all

    def _leave(self, reason: str) -> None:
        code = 128 + self.requested
        self.leaving(code, reason)
        os._exit(code)
