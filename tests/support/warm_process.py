"""The process behind tests/support/warm_start.py, which becomes a command in each of its clones.

    python -m tests.support.warm_process <descriptor of a socket> <room for arguments>

A command that starts ranks gets a spare before it begins: a fork that waits for requests as this process
does. So its ranks are its own children, and none has anything of what the command has done meanwhile.
"""

import ctypes
import fcntl
import gc
import io
import os
import pickle
import platform
import runpy
import signal
import socket
import struct
import subprocess
import sys
from typing import Any

from tests.support import warm_start

subprocess.Popen = warm_start.Popen                      # before torchrun imports it by name

import hydra.utils  # noqa: E402, F401
import torch._dynamo  # noqa: E402, F401
import torch.distributed.run  # noqa: E402, F401
import torch.distributed.tensor  # noqa: E402, F401

import moetrain.cli.eval  # noqa: E402, F401
import moetrain.cli.generate  # noqa: E402, F401
import moetrain.cli.train  # noqa: E402
import moetrain.launch.node  # noqa: E402, F401
import moetrain.train.loop  # noqa: E402, F401
from moetrain.config.compose import compose  # noqa: E402

_SYS_CLONE = {"x86_64": 56, "aarch64": 220}[platform.machine()]
_CLONE_PARENT = 0x8000                                   # the clone is a child of our parent
_APART = 200                                             # no command asks for descriptors from here on
_PATH = [entry for entry in sys.path if os.path.realpath(entry or ".") != str(warm_start.ROOT)]


def serve(ours: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Answer requests until the other end is closed.

    Returns in clones alone: the request and the descriptors that came with it.
    """
    while True:
        head, descriptors, _, _ = socket.recv_fds(ours, 4, 64)
        if not head:
            os._exit(0)
        request = pickle.loads(ours.recv(struct.unpack("!I", head)[0], socket.MSG_WAITALL))
        process = _clone()
        if process == 0:
            ours.close()
            return request, descriptors
        for descriptor in descriptors:
            os.close(descriptor)
        ours.sendall(struct.pack("!i", process))


def _clone() -> int:
    """os.fork with CLONE_PARENT.

    The C library's preparations for a fork are left out. They are about other threads, and there are none.
    """
    library, python = ctypes.PyDLL(None), ctypes.pythonapi
    library.syscall.restype = ctypes.c_long
    flags = ctypes.c_long(_CLONE_PARENT | signal.SIGCHLD)
    python.PyOS_BeforeFork()
    process = library.syscall(ctypes.c_long(_SYS_CLONE), flags, *[ctypes.c_long(0)] * 4)
    if process == 0:
        python.PyOS_AfterFork_Child()
    else:
        python.PyOS_AfterFork_Parent()
    return process


def become(request: dict[str, Any], descriptors: list[int]) -> None:
    """Run the command of the request, as if this process had been executed for it."""
    words, environment = request["words"], request["environment"]
    module, *arguments = words[words.index("-m") + 1:]
    starts_others = module != "moetrain" or any(
        word in ("-m", "--multirun") or word.startswith("run.nproc=") for word in arguments)
    spare = _spare(environment, descriptors) if starts_others and "RANK" not in environment else None
    warm_start.current.set(spare)
    if request["new_session"]:
        os.setsid()
    else:
        group = request["group"]
        os.setpgid(0, os.getpgid(os.getppid()) if group in (None, -1) else group)
    _take(descriptors, [0, 1, 2, *request["kept"]])
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(environment)
    _open_streams(unbuffered="-u" in words[:2] or bool(environment.get("PYTHONUNBUFFERED")))
    _show(words)
    first = [] if environment.get("PYTHONSAFEPATH") else [os.getcwd()]
    sys.path[:] = [*first, *environment["PYTHONPATH"].split(os.pathsep), *_PATH]
    sys.argv[:] = ["-m", *arguments]
    sys.orig_argv[:] = words
    if "PICTURES" not in environment:
        moetrain.cli.train.draw = lambda directory: None
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _spare(environment: dict[str, str], descriptors: list[int]) -> warm_start.WarmProcess:
    """A warm process for what this one will start."""
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        ours.close()
        for descriptor in descriptors:                   # who reads our output waits for its end
            os.close(descriptor)
        os.setpgid(0, 0)                                 # signals of a terminal are for the command
        _show(["spare"])
        become(*serve(theirs))
        sys.exit()
    theirs.close()
    apart = socket.socket(fileno=fcntl.fcntl(ours.fileno(), fcntl.F_DUPFD_CLOEXEC, _APART))
    ours.close()
    return warm_start.WarmProcess(apart, warm_start.read_at_import(environment))


def _take(descriptors: list[int], numbers: list[int]) -> None:
    """Give each descriptor its number."""
    apart = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _APART) for descriptor in descriptors]
    for descriptor in descriptors:
        os.close(descriptor)
    for descriptor, number in zip(apart, numbers, strict=True):
        os.dup2(descriptor, number, inheritable=True)
        os.close(descriptor)


def _open_streams(*, unbuffered: bool) -> None:
    """Make sys.stdin, sys.stdout and sys.stderr as an interpreter does."""
    before = {"stdin": sys.stdin, "stdout": sys.stdout, "stderr": sys.stderr}
    streams: dict[str, io.TextIOWrapper] = {
        "stdin": open(0, encoding=sys.stdin.encoding, errors=sys.stdin.errors, closefd=False)}
    for number, name in ((1, "stdout"), (2, "stderr")):
        raw = io.BufferedWriter(io.FileIO(number, "wb", closefd=False))
        streams[name] = io.TextIOWrapper(
            raw, encoding=before[name].encoding, errors=before[name].errors,
            line_buffering=number == 2 or os.isatty(number), write_through=unbuffered)
    for name, stream in streams.items():
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _show(words: list[str]) -> None:
    """Put these words into /proc/<this process>/cmdline, in the place of our own."""
    with open("/proc/self/stat") as file:
        fields = file.read().rpartition(") ")[2].split()
    begin, end = int(fields[45]), int(fields[46])        # arg_start and arg_end: fields 48 and 49 of proc(5)
    text = b"".join(word.encode() + b"\0" for word in words)[:end - begin - 1]
    ctypes.memmove(begin, text.ljust(end - begin, b"\0"), end - begin)


def main() -> None:
    compose(["experiment=debug"])                        # Hydra imports more at its first use
    gc.collect()
    gc.freeze()                                          # memory pages of what is imported stay shared
    assert len(os.listdir("/proc/self/task")) == 1, "a clone would lack a thread of this process"
    become(*serve(socket.socket(fileno=int(sys.argv[1]))))


if __name__ == "__main__":
    main()
