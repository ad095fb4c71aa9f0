"""Signals in one process.

What they do to whole runs: tests/integration/test_restart.py and test_stopping.py.
"""

import bdb
import io
import os
import pdb
import signal
import subprocess
import sys
import time

import pytest

from moetrain.train.preemption import SIGNALS, Preemption, startup_signals


class Signals:
    """What is raised while it goes is passed over, as in callbacks of imports."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def preemption() -> Preemption:
    return Preemption(grace_s=None, leaving=lambda code, reason: pytest.fail(reason))


def asked(told: Preemption, wait_s: float) -> signal.Signals | None:
    """What was asked for within a time: the signal goes through a thread."""
    until = time.monotonic() + wait_s
    while told.requested is None and time.monotonic() < until:
        time.sleep(0.01)
    return told.requested


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_a_run_starts_leaves_at_once(number):
    before = [signal.getsignal(other) for other in SIGNALS]
    with pytest.raises(SystemExit) as left, startup_signals():
        os.kill(os.getpid(), number)
        pytest.fail("it went on")
    assert left.value.code == 128 + number and [signal.getsignal(other) for other in SIGNALS] == before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_one_that_python_passed_over_leaves_before_the_first_step():
    reached = False
    with pytest.raises(SystemExit) as left, startup_signals():
        Signals()
        reached = True
        with preemption():
            pytest.fail("a step")
    assert reached and left.value.code == 143


def test_without_a_signal_the_first_step_comes():
    with startup_signals(), preemption() as told:
        assert told.requested is None


@pytest.mark.parametrize("number", SIGNALS)
def test_every_way_to_stop_asks_for_a_save(number):
    before = [signal.getsignal(other) for other in SIGNALS]
    with preemption() as told:
        os.kill(os.getpid(), number)
        assert asked(told, 10) == number
    assert [signal.getsignal(other) for other in SIGNALS] == before


def test_what_the_process_was_started_to_ignore_stays_ignored():
    """nohup ignores SIGHUP, a shell script SIGINT for what it starts in the background."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with startup_signals(), preemption() as told:
            os.kill(os.getpid(), signal.SIGHUP)
            assert asked(told, 0.2) is None and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("numbers, code", [("SIGINT SIGINT", 130), ("SIGHUP SIGHUP SIGTERM", 129),
                                           ("SIGTERM SIGHUP", 0)])
def test_the_second_one_leaves_at_once_but_a_terminal_closes_once(numbers, code):
    """The kernel and the shell both tell of a terminal that is closed."""
    script = f"""
import os, signal, time
from moetrain.train import preemption as preempt
preempt.ECHO_S = 0
with preempt.Preemption(grace_s=None, leaving=lambda code, reason: print(code, reason, flush=True)):
    for name in "{numbers}".split():
        os.kill(os.getpid(), getattr(signal, name))
        time.sleep(0.3)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == code and done.stderr == ""
    assert (f"{code} " in done.stdout and "without a save" in done.stdout) if code else done.stdout == ""


class Typed(io.StringIO):
    """Somebody at the prompt of a debugger, who presses Ctrl-C before every second line."""

    def __init__(self, *lines: str) -> None:
        super().__init__()
        self.lines = [entry for line in lines for entry in ("Ctrl-C", line)]

    def readline(self, size: int = -1) -> str:
        if (entry := self.lines.pop(0)) == "Ctrl-C":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
            return "p 'Ctrl-C was passed over'\n"
        return f"{entry}\n"


def test_ctrl_c_belongs_to_the_debugger_while_there_is_one():
    shown, typed = io.StringIO(), Typed("continue", "continue")
    debugger = pdb.Pdb(stdin=typed, stdout=shown, nosigint=False, readrc=False)
    before = signal.getsignal(signal.SIGINT)
    with preemption() as told:
        debugger.set_trace()
        os.kill(os.getpid(), signal.SIGINT)              # after `continue` it is pdb's: back to the prompt
        time.sleep(0.1)
        assert told.requested is None
        sys.settrace(None)
    output = shown.getvalue()
    assert (output.count("--KeyboardInterrupt--") == 2 and "passed over" not in output
            and not typed.lines), output
    assert signal.getsignal(signal.SIGINT) is before


def test_a_program_that_runs_inside_a_debugger_leaves_it_ctrl_c():
    """As with python -m pdb."""
    def program() -> None:
        with startup_signals(), preemption():
            handlers.extend(map(signal.getsignal, (signal.SIGINT, signal.SIGTERM)))

    handlers, before = [], signal.getsignal(signal.SIGINT)
    debugger = bdb.Bdb()
    debugger.user_line = lambda frame: debugger.set_continue()
    debugger.runcall(program)
    assert handlers[0] is before and handlers[1] is not signal.SIG_DFL
