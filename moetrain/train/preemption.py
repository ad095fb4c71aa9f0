"""Preemption: on SIGINT, SIGHUP, SIGTERM or SIGUSR1, save at the end of the step and exit with code 10.

    first signal           sets `requested`; the loop reports it in the flags of the step (train/step.py), so
                           all ranks save and exit after the same step, whichever of them received a signal
    second signal          exits at once, without a save
    end of run.grace_s     the same: the scheduler is about to kill the process
    signal during start    raises SystemExit: there is nothing to save

A thread handles the signals. A rank that waits inside a collective cannot run Python's signal handlers, but
the interpreter's C handler writes the signal's number to a file descriptor at any time
(`signal.set_wakeup_fd`).

A signal that the process was started to ignore stays ignored (nohup, background jobs of a script). Under a
debugger, Ctrl-C belongs to the debugger: at its prompt, and where it has installed a handler.
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

# Seconds in which a second signal counts as the first: Slurm signals every process of a job step, and the
# launcher passes the same signal on.
ECHO_S = 1.0
# Seconds for recording the exit of a process that exits at once, on a disk that may hang.
LEAVE_S = 5.0
SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1)
CAUSES = {signal.SIGINT: "SIGINT (Ctrl-C)", signal.SIGHUP: "SIGHUP (the terminal was closed)"}

log = logging.getLogger(__name__)


def cause(number: int) -> str:
    """Name of a signal for messages, such as `SIGINT (Ctrl-C)`."""
    return CAUSES.get(signal.Signals(number), signal.Signals(number).name)


def in_main_thread() -> bool:
    """Whether this is the main thread, the only one in which Python allows signal handlers.

    A program that trains in another thread must handle signals itself.
    """
    return threading.current_thread() is threading.main_thread()


class StartupSignals:
    """Signal handler of `startup_signals`: raises SystemExit.

    `received` keeps the signal, because Python ignores exceptions that are raised inside callbacks of imports
    or of garbage collection. `Preemption` raises SystemExit again.
    """

    received: int | None = None

    def __call__(self, number: int, frame: object) -> None:
        self.received = number
        raise SystemExit(128 + number)


@contextmanager
def startup_signals() -> Iterator[None]:
    """Context for the start of a run, in which a signal raises SystemExit with 128 + its number."""
    leave = StartupSignals()
    before = {number: signal.signal(number, leave)
              for number in SIGNALS if in_main_thread() and _is_free(number)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is leave:        # otherwise Preemption has set its own
                signal.signal(number, handler)


class Preemption:
    """Context in which signals request a save. Outside the main thread it does nothing.

    `requested` is the first signal that this rank has received, or None.

    Args:
        grace_s: seconds from the first signal to an exit without a save; None waits for the save, however
            long it takes.
        leaving: called with exit code and reason before the process exits without a save.
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
        for number, handler in self._before.items():
            # After a preemption signals are ignored: the one of another node may arrive after the last step.
            signal.signal(number, signal.SIG_IGN if kind is Preempted else handler)
        self._writes.close()                             # ends the thread

    def _watch(self) -> None:
        """Body of the thread: read signal numbers until the socket is closed or the grace period ends."""
        try:
            while numbers := self._reads.recv(16):
                for number in numbers:
                    if number in SIGNALS and not _is_debuggers(number):
                        self._told(signal.Signals(number))
                self._reads.settimeout(self._left())
        except TimeoutError:
            assert self.requested is not None              # without a request nothing limits the wait
            self._leave(self.requested,
                        f"{cause(self.requested)} came {self.grace_s:g} s ago and the save is not done")
        finally:
            self._reads.close()

    def _told(self, number: signal.Signals) -> None:
        """Act on a signal: the first one requests a save, a later one exits."""
        if self.requested is None:
            self.requested, self._told_at = number, time.monotonic()
            # Logged in a thread of its own: a terminal that blocks output must not delay the next signal.
            threading.Thread(target=log.info, daemon=True, args=(
                "[stop] %s: saving after this step, then leaving; another one leaves at once, without a save",
                cause(number))).start()
        # A repeated SIGHUP is no second request: the kernel and the shell both send it.
        elif number != signal.SIGHUP and time.monotonic() >= self._told_at + ECHO_S:
            self._leave(self.requested, f"{cause(number)} came after {cause(self.requested)}: "
                                        "left at once, without a save")

    def _left(self) -> float | None:
        """Remaining seconds of the grace period; None if nothing limits the wait."""
        if self.requested is None or self.grace_s is None:
            return None
        # A timeout of 0 would make the socket non-blocking.
        return max(self._told_at + self.grace_s - time.monotonic(), 1e-3)

    def _leave(self, first: int, reason: str) -> None:
        """Exit by the first signal, without unwinding, once `leaving` has recorded it or LEAVE_S are over."""
        code = 128 + first
        last_words = threading.Thread(target=self.leaving, args=(code, reason), daemon=True)
        last_words.start()
        last_words.join(LEAVE_S)
        os._exit(code)


def _on_signal(number: int, frame: FrameType | None) -> None:
    """Handler of signals. The thread acts on them; only at a debugger's prompt Ctrl-C raises here."""
    if number == signal.SIGINT and _is_debugging(frame):
        raise KeyboardInterrupt


def _is_free(number: int) -> bool:
    """Whether a handler may be replaced: not that of an ignored signal, nor a debugger's for Ctrl-C."""
    handler = signal.getsignal(number)
    if number != signal.SIGINT or isinstance(handler, StartupSignals):
        return handler is not signal.SIG_IGN
    return handler in (signal.SIG_DFL, signal.default_int_handler) and not _is_debugging(sys._getframe())


def _is_debuggers(number: int) -> bool:
    """Whether a signal is meant for a debugger.

    pdb's `continue` installs a handler; at pdb's prompt its frames are on the stack of the main thread.
    """
    if number != signal.SIGINT:
        return False
    main = sys._current_frames().get(threading.main_thread().ident or 0)
    return signal.getsignal(number) is not _on_signal or _is_debugging(main)


def _is_debugging(frame: FrameType | None) -> bool:
    """Whether a debugger's frame is on the stack."""
    while frame is not None:
        if frame.f_globals.get("__name__") == "bdb":     # the base of pdb and of other debuggers in Python
            return True
        frame = frame.f_back
    return False
