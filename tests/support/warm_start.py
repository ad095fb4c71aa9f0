"""Start `python -m moetrain` in a process that has imported torch already.

    Popen    subprocess.Popen, but a command of WARM comes from the warm process
    run      subprocess.run with that Popen

Importing torch and the package takes seconds of CPU time, and most tests of the command line are about what
comes after it. The first command of a pytest worker starts the warm process (tests/support/warm_process.py),
which imports and then clones itself for each command. The clone is a child of the process that asked
(CLONE_PARENT). It has the command's arguments in /proc, its environment, folder, descriptors, process group
and default signal handlers, and is waited for, signalled, stopped and killed as any other process. Ranks that
it starts (run.nproc, torchrun) are clones as well.

What differs from a process that was executed: /proc/<pid>/environ; the hash seed, which all clones share; and
that `moetrain train` draws no pictures at its end, which would take longer than a short run. With PICTURES=1
in the environment it draws them.

Executed as ever: a command whose variables that are read at import differ (_READ_AT_IMPORT), or whose
PYTHONPATH does; one with a shell or a preexec_fn; all commands with COLD_START=1, which --all sets.
"""

import atexit
import inspect
import os
import pickle
import platform
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
WARM = ("moetrain", "moetrain.launch", "moetrain.launch.agent", "torch.distributed.run")       # of python -m
MACHINES = ("x86_64", "aarch64")
_READ_AT_IMPORT = ("PYTHON", "LANG", "LC_", "LD_", "OMP_", "MKL_", "KMP_", "MPL", "CUDA_", "SIMULATED_")
_READ_LATER = ("PYTHONPATH", "PYTHONSAFEPATH", "PYTHONUNBUFFERED")
_SIGNATURE = inspect.signature(subprocess.Popen._execute_child)


def read_at_import(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that a clone can no longer change."""
    return {name: value for name, value in environment.items()
            if name.startswith(_READ_AT_IMPORT) and name not in _READ_LATER}


class WarmProcess:
    """A warm process that is a child of this one, at the other end of a socket.

    settings: its variables that were read at import.
    """

    def __init__(self, ours: socket.socket, settings: dict[str, str]) -> None:
        self.settings = settings
        self._socket = ours
        self._lock = threading.Lock()

    def clone(self, request: Mapping[str, Any], descriptors: Sequence[int]) -> int:
        """Process id of a new child of ours that runs the command of the request."""
        message = pickle.dumps(dict(request))
        with self._lock:
            socket.send_fds(self._socket, [struct.pack("!I", len(message))], list(descriptors))
            self._socket.sendall(message)
            return struct.unpack("!i", self._socket.recv(4, socket.MSG_WAITALL))[0]

    def close(self) -> None:
        self._socket.close()


class _Current:
    """The warm process of this process, started when it is first asked for in pytest."""

    def __init__(self) -> None:
        self._owner = 0                                  # a fork of ours is not the parent of our children
        self._warm: WarmProcess | None = None

    def get(self) -> WarmProcess | None:
        if self._owner != os.getpid():
            self.set(_start() if "pytest" in sys.modules else None)
        return self._warm

    def set(self, warm: WarmProcess | None) -> None:
        self._owner, self._warm = os.getpid(), warm


current = _Current()


def _start() -> WarmProcess | None:
    if sys.platform != "linux" or platform.machine() not in MACHINES or os.environ.get("COLD_START") == "1":
        return None
    ours, theirs = socket.socketpair()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # The blanks are room for the arguments that a clone shows in /proc.
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.warm_process", str(theirs.fileno()), " " * 8000], cwd=ROOT,
        env=environment, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], process_group=0)
    theirs.close()
    warm = WarmProcess(ours, read_at_import(environment))

    def end() -> None:
        warm.close()
        process.wait()

    atexit.register(end)
    return warm


class Popen(subprocess.Popen):
    """subprocess.Popen, but commands of WARM come from the warm process."""

    def _execute_child(self, *given: Any) -> None:
        asked = _SIGNATURE.bind(self, *given).arguments
        warm = current.get() if _can_be_warm(asked) else None
        if warm is None or read_at_import(_environment(asked)) != warm.settings:
            return super()._execute_child(*given)
        streams = [asked["p2cread"], asked["c2pwrite"], asked["errwrite"]]
        descriptors = [number if given == -1 else given for number, given in enumerate(streams)]
        kept = sorted(asked["pass_fds"])
        self.pid = warm.clone({
            "words": [os.fspath(word) for word in asked["args"]], "environment": dict(_environment(asked)),
            "folder": os.fspath(asked["cwd"] or os.getcwd()), "kept": kept,
            "new_session": asked["start_new_session"], "group": asked["process_group"],
        }, descriptors + kept)
        self._child_created = True
        pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(asked[name] for name in pipes))


def _environment(asked: Mapping[str, Any]) -> Mapping[str, str]:
    return os.environ if asked["env"] is None else asked["env"]


def _can_be_warm(asked: Mapping[str, Any]) -> bool:
    if isinstance(asked["args"], (str, bytes, os.PathLike)) or asked["shell"] or asked["preexec_fn"]:
        return False
    words = [word for word in asked["args"] if word != "-u"]
    is_ours = words[:2] == [sys.executable, "-m"] and words[2] in WARM
    return is_ours and _environment(asked).get("PYTHONPATH") == str(ROOT)


def run(words: Sequence[str], *, timeout: float | None = None, **given: Any) -> subprocess.CompletedProcess:
    """Run a command as `subprocess.run` does, in a warm process where that is possible."""
    with Popen(words, **given) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(words, process.returncode, output, errors)
