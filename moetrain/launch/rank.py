"""A process as a rank: whether a launcher started it, its number, and where its error messages go."""

import ctypes
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from moetrain.errors import ConfigError

# Process id of `start_ranks`, in the environment of the ranks that it started.
# Each of these writes stderr to a log file of its own.
LAUNCHED = "MOETRAIN_LAUNCHED"
# Descriptor of a pipe to that process, into which a rank writes its number when its work is done.
DONE = "MOETRAIN_DONE"
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
# Whole numbers that launchers set for each rank.
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")


def is_worker() -> bool:
    """Whether torchrun or `start_ranks` started this process, which then must not start ranks itself.

    Raises ConfigError where the environment contradicts itself.
    """
    if "RANK" not in os.environ:
        return False
    for name in _RANK_VARIABLES:
        text = os.environ.get(name, "0")
        if not text.isdecimal():
            raise _wrong_environment(
                f"{name}={text}", ", ".join(dict.fromkeys([name, "RANK"])),
                f"RANK is set, so this would be a rank, and {name} is no number")
    if rank() >= int(os.environ.get("WORLD_SIZE", rank() + 1)):
        raise _wrong_environment(
            f"RANK={rank()} with WORLD_SIZE={os.environ['WORLD_SIZE']}", "RANK, WORLD_SIZE",
            "ranks are numbered from 0 to WORLD_SIZE - 1")
    return True


def _wrong_environment(what: str, where: str, why: str) -> ConfigError:
    return ConfigError(
        140, f"{what} in the environment", where=where, why=why,
        next="unset RANK, and start ranks with run.nproc, torchrun or launch/node.sh, which set all of it")


def rank() -> int:
    """Number of this process among the ranks; 0 in a process that is not one."""
    text = os.environ.get("RANK", "0")
    return int(text) if text.isdecimal() else 0  # `is_worker` refuses anything else


def under_torchrun() -> bool:
    """Whether torchrun, or another launcher that sets RANK, started this rank, not `start_ranks`."""
    return "RANK" in os.environ and LAUNCHED not in os.environ


def has_own_stderr() -> bool:
    """Whether stderr is shared with no other rank that prints: on rank 0, and where it is a log file."""
    return rank() == 0 or LAUNCHED in os.environ


def become_rank() -> Callable[[], None]:
    """Prepare a process that a launcher started, before it does anything else.

    Ctrl-C ends it at once until there is something to save (train/preemption.py): Python's own handler would
    wait for the collective that the rank is in. A rank of `start_ranks` gets SIGTERM when its launcher is
    gone, so that it saves and leaves: no process would start it again.

    Returns:
        A function to call when the rank's work is done.
    """
    if "RANK" in os.environ and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    _end_with_launcher()
    pipe = os.environ.pop(DONE, "")  # hidden from processes that the rank starts
    if not pipe.isdecimal() or not stat.S_ISFIFO(os.fstat(int(pipe)).st_mode):
        return lambda: None
    os.set_inheritable(int(pipe), False)

    def done() -> None:
        with suppress(BrokenPipeError):
            os.write(int(pipe), f"{rank()}\n".encode())

    return done


def _end_with_launcher() -> None:
    launcher = os.environ.get(LAUNCHED)
    if launcher is None:
        return
    # The kernel sends SIGCONT to a stopped rank when its launcher dies. The rank goes on, and then sees it.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGCONT), 0, 0, 0)

    def watch() -> None:
        while os.getppid() == int(launcher):
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="launcher", daemon=True).start()
