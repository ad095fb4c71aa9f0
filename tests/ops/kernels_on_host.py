"""The kernels of csrc/ under a host compiler: built once per state of the sources, called with CPU tensors.

    call("permute", x, slots, rows, out, tokens, slots_per_token, num_rows, row_bytes, order=0)

`order` is the order in which the threads of a block run (cuda_on_host.h). `poisoned` makes an output that
holds NaN and lies between guards that `check_guards` looks at.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from tests.support import needs

ROOT = Path(__file__).parents[2]
CSRC, HERE = ROOT / "csrc", Path(__file__).parent
ORDERS = (0, 1, 7)
GUARD = 64                                               # elements before and behind an output
FLAGS = ["-std=c++20", "-O1", "-g0", "-fPIC", "-shared", "-DMOETRAIN_ON_HOST", "-U_FORTIFY_SOURCE",
         "-Wno-unknown-pragmas",
         "-fsanitize=undefined", "-fno-sanitize-recover", "-fsanitize-undefined-trap-on-error"]
SUFFIX = {torch.bfloat16: "bf16", torch.float32: "float", torch.float64: "double"}


@cache
def library() -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        needs.missing("no g++ (apt-get install g++): the kernels cannot be run on the host")
    sources = [*sorted(CSRC.glob("*.*h")), HERE / "cuda_on_host.h", HERE / "kernels_on_host.cpp"]
    contents = b"".join(path.read_bytes() for path in sources)
    digest = hashlib.sha256(" ".join(FLAGS).encode() + contents).hexdigest()[:16]
    built = ROOT / "build" / "kernels_on_host" / f"{digest}.so"
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        unfinished = built.with_suffix(f".{os.getpid()}")       # two workers may build at once
        subprocess.run([compiler, *FLAGS, "-I", str(CSRC), "-I", str(HERE), str(HERE / "kernels_on_host.cpp"),
                        "-o", str(unfinished)], check=True)
        unfinished.rename(built)
    return ctypes.CDLL(str(built))


def bindings() -> Path:
    """The library that registers the kernels for CPU tensors of torch."""
    compiler, folder = shutil.which("g++"), Path(torch.__file__).parent
    if compiler is None:
        needs.missing("no g++ (apt-get install g++): the kernels cannot be run on the host")
    flags = [flag for flag in FLAGS if "sanitize" not in flag] + ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
    sources = [*sorted(CSRC.glob("*.*h")), *sorted(CSRC.glob("*.cu")), HERE / "cuda_on_host.h",
               HERE / "bindings_on_host.cpp"]
    contents = b"".join(path.read_bytes() for path in sources)
    digest = hashlib.sha256(f"{flags} {torch.__version__}".encode() + contents).hexdigest()[:16]
    library = ROOT / "build" / "kernels_on_host" / f"bindings-{digest}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")       # two workers may build at once
        subprocess.run([compiler, *flags, "-I", str(CSRC), "-I", str(HERE),
                        "-isystem", str(folder / "include"),
                        str(HERE / "bindings_on_host.cpp"), "-L", str(folder / "lib"), "-ltorch_cpu", "-lc10",
                        "-o", str(unfinished)], check=True)
        unfinished.rename(library)
    return library


def call(name: str, *arguments: Tensor | int | None | ctypes.Structure, order: int = 0) -> None:
    """Run a launch function; what the emulation found wrong is an AssertionError."""
    function = getattr(library(), name)
    function.restype = ctypes.c_char_p
    failure = function(ctypes.c_int(order), *map(_argument, arguments))
    assert failure is None, f"{name}: {failure.decode()}"


def _argument(value):
    if isinstance(value, Tensor):
        assert value.is_contiguous()
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, ctypes.Structure):
        return ctypes.byref(value)
    return ctypes.c_int64(value) if isinstance(value, int) else None


def arithmetic(name: str, *arguments: int, answers: int = 0) -> int | list[int]:
    """A function of csrc/launch.h; with `answers`, one that writes so many numbers."""
    function = getattr(library(), f"arithmetic_{name}")
    function.restype = ctypes.c_int64
    into = (ctypes.c_int64 * max(1, answers))()
    result = function(*map(_argument, arguments), *([into] if answers else []))
    return list(into) if answers else result


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    """An output full of NaN (or -77), with guards round it."""
    size = torch.Size(shape).numel()
    whole = torch.full((size + 2 * GUARD,), torch.nan if dtype.is_floating_point else -77, dtype=dtype)
    return whole[GUARD:GUARD + size].view(shape)


def check_guards(*outputs: Tensor) -> None:
    for output in outputs:
        whole = torch.empty(0, dtype=output.dtype).set_(output.untyped_storage())
        guards = torch.cat([whole[:GUARD], whole[GUARD + output.numel():]])
        assert len(guards) == 2 * GUARD
        untouched = guards.isnan() if output.is_floating_point() else guards == -77
        assert untouched.all(), "written outside"


def unaligned(x: Tensor) -> Tensor:
    """The same values one element off any alignment."""
    moved = torch.empty(x.numel() + 1, dtype=x.dtype)[1:]
    return moved.copy_(x.flatten()).view(x.shape)
