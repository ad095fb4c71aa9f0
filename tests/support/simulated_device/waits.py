"""Record of what makes the host wait for the device."""

import ctypes
import sys
from collections import Counter
from typing import NamedTuple

import torch


class Wait(NamedTuple):
    phase: str
    backward: bool
    kind: str
    operator: str
    place: str                                       # file:function of the innermost frame in moetrain


class Record(Counter[Wait]):
    """How often the host waited for the device, or may have."""

    phase = "setup"

    def add(self, kind: str, operator: str) -> None:
        backward = torch._C._current_graph_task_id() != -1
        self[Wait(self.phase, backward, kind, operator, place())] += 1


RECORD = Record()
_COPIES = ("moetrain.ops.pinned", "moetrain.ops.host_read")
_MODES = ("__torch_dispatch__", "_keep", "_give")


def place() -> str:
    """Innermost function of moetrain on the stack, but for dispatch modes and what only copies for others."""
    frame = sys._getframe(2)
    while frame is not None:
        module, name = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        if module.startswith("moetrain.") and module not in _COPIES and name not in _MODES:
            return f"{module.removeprefix('moetrain.').replace('.', '/')}.py:{name}"
        frame = frame.f_back
    return ""


@ctypes.CFUNCTYPE(None, ctypes.c_char_p)
def synchronized(what: bytes) -> None:
    """Called by the device guard: torch synchronizes events, and what torch.accelerator names, in C++."""
    RECORD.add("synchronize", what.decode())
