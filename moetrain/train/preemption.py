"""Told to stop: Ctrl-C, a closed terminal, SIGTERM and SIGUSR1 save at the next step's end and leave with
code 10.

    first signal         `requested` is set; the loop reports it in the flags of the step (train/step.py), so that all ranks save
                         and leave after the same step, whichever of them were told
    second signal        leaves at once, without a save
    run.grace_s is over  the same: whoever told us will not wait longer
    while the run starts the same: there is nothing to save

A thread watches: a rank that waits for others inside a collective cannot run Python's signal handlers, but
the interpreter's C handler writes the signal's number to a pipe at any time.

What a process was started to ignore stays ignored (nohup, background jobs of a script). Ctrl-C belongs to a
debugger where there is one: at its prompt it does what the debugger says, and a handler that it has installed
stays.
"""

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from moetrain.errors import Preempted

ECHO_S = 1.0    # Slurm signals every process of a step, and the launcher passes the same signal on
LEAVE_S = 5.0   # for the last words of a process that leaves at once, on a disk that may hang
SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1)
CAUSES = {signal.SIGINT: "SIGINT (Ctrl-C)", signal.SIGHUP: "SIGHUP (the terminal was closed)"}

log = logging.getLogger(__name__)


def cause(number: int) -> str:
    """The signal as a user knows it."""
    number = signal.Signals(number)
    return CAUSES.get(number, number.name)


def in_main_thread() -> bool:
    """Python lets the main thread alone handle signals.

    A program that trains in another one says itself what stops it.
    """
    return threading.current_thread() is threading.main_thread()


class StartupSignals:
    """The handler of `startup_signals`.

    received: the signal, for Python passes over what is raised inside callbacks of imports or of memory.
    """

    received: int | None = None

    def __call__(self, number: int, frame: object) -> None:
        self.received = number
        raise SystemExit(128 + number)


@contextmanager
def startup_signals() -> Iterator[None]:
    """While a run starts there is nothing to save:

    the first signal leaves in order, by SystemExit with 128 + its number.
    """
    leave = StartupSignals()
    before = {number: signal.signal(number, leave) for number in SIGNALS if in_main_thread() and _is_free(number)}
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
            if isinstance(handler, StartupSignals) and handler.received:
                raise SystemExit(128 + handler.received)
        self._entered = in_main_thread()
        if not self._entered:
            return self
        self._reads, self._writes = socket.socketpair()
        self._writes.setblocking(False)
        self._before = {number: signal.signal(number, _on_signal) for number in SIGNALS if _is_free(number)}
        self._wakeup = signal.set_wakeup_fd(self._writes.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="preemption", daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._entered:
            return
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():     # another node's signal may come after the step that agreed
            signal.signal(number, signal.SIG_IGN if kind is Preempted else handler)
        self._writes.close()                             # ends the thread

    def _watch(self) -> None:
        try:
            while numbers := self._reads.recv(16):
                for number in numbers:
                    if number in SIGNALS and not _is_debuggers(number):
                        self._told(signal.Signals(number))
                self._reads.settimeout(self._left())
        except TimeoutError:
            self._leave(f"{cause(self.requested)} came {self.grace_s:g} s ago and the save is not done")
        finally:
            self._reads.close()

    def _told(self, number: signal.Signals) -> None:
        if self.requested is None:
            self.requested, self._told_at = number, time.monotonic()
            # In a thread of its own: a terminal that takes no text must not keep this one from the next
            # signal.
            threading.Thread(target=log.info, daemon=True, args=(
                "[stop] %s: saving after this step, then leaving; another one leaves at once, without a save", cause(number))).start()
        elif number != signal.SIGHUP and time.monotonic() >= self._told_at + ECHO_S:    # the kernel and the shell both send SIGHUP
            self._leave(f"{cause(number)} came after {cause(self.requested)}: left at once, without a save")

    def _left(self) -> float | None:
        """Seconds of the grace period that are left; None while nothing limits the wait."""
        if self.requested is None or self.grace_s is None:
            return None
        return max(self._told_at + self.grace_s - time.monotonic(), 1e-3)                     # 0 would not wait at all

    def _leave(self, reason: str) -> None:
        code = 128 + self.requested
        last_words = threading.Thread(target=self.leaving, args=(code, reason), daemon=True)
        last_words.start()
        last_words.join(LEAVE_S)
        os._exit(code)


def _on_signal(number: int, frame: FrameType | None) -> None:
    """The thread has heard of it; only at a debugger's prompt is there something to do."""
    if number == signal.SIGINT and _is_debugging(frame):
        raise KeyboardInterrupt


def _is_free(number: int) -> bool:
    """Whether the handler may be replaced: not what is ignored, nor a debugger's Ctrl-C."""
    handler = signal.getsignal(number)
    if number != signal.SIGINT or isinstance(handler, StartupSignals):
        return handler is not signal.SIG_IGN
    return handler in (signal.SIG_DFL, signal.default_int_handler) and not _is_debugging(sys._getframe())


def _is_debuggers(number: int) -> bool:
    """Whether a signal is meant for a debugger:

    pdb's `continue` installs a handler, and at its prompt its frames are on the stack.
    """
    if number != signal.SIGINT:
        return False
    main = sys._current_frames().get(threading.main_thread().ident)
    return signal.getsignal(number) is not _on_signal or _is_debugging(main)


def _is_debugging(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_globals.get("__name__") == "bdb":     # the base of pdb and of other debuggers in Python
            return True
        frame = frame.f_back
    return False
