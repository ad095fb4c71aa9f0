"""Definition of the package's torch ops, and loading of their CUDA kernels.

`define` registers an op by its schema, so that it exists without a compiler. The op's file in `ops/` gives
the reference in plain torch, the fake and the gradient. A compiled `csrc/<op>.cu` only adds a CUDA
implementation to the same op.

The kernels have never run on a GPU. They are off unless MOETRAIN_KERNELS=1 is set, and are then loaded from
the library that tools/build_cuda.py builds, on a torch with CUDA. If anything prevents that, one warning says
what, and every op runs its reference, with the same results.
"""

import ctypes
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

SWITCH = "MOETRAIN_KERNELS"
# Written by tools/build_cuda.py, with a label beside it: hash of the sources, architectures, release of CUDA.
LIBRARY = Path(__file__).parents[1] / "_C_cuda.so"
BUILD = "python tools/build_cuda.py makes it"
SOURCES = Path(__file__).parents[2] / "csrc"              # in a checkout; an installed package has none

_LIBRARY = torch.library.Library("moetrain", "DEF")


def define(
    schema: str,
    *,
    reference: Callable,
    fake: Callable | None = None,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
) -> Callable:
    """Define the op `moetrain::<schema>` and return it.

    Args:
        schema: name, arguments and results of the op, in the language of `torch.library`.
        reference: implementation in plain torch, for any device.
        fake: shapes and dtypes of the results without data. Without it, the reference serves, which must then
            have no data-dependent sizes.
        backward: gradient, as in `torch.library.register_autograd`; None for an op without gradient.
        setup_context: what backward keeps, as in `torch.library.register_autograd`.

    Returns:
        The op's default overload.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moetrain::{name}", fake or reference, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(
            f"moetrain::{name}", backward, setup_context=setup_context, lib=_LIBRARY
        )
    return getattr(torch.ops.moetrain, name).default


def sources_hash(folder: Path = SOURCES) -> str:
    """Hash the names and contents of the kernel sources in csrc/."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.cu"), *folder.glob("*.cuh"), *folder.glob("*.h")]):
        digest.update(f"{path.name}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def load(library: Path = LIBRARY, sources: Path = SOURCES) -> str | None:
    """Load the compiled kernels; return why they are not in use, or None when they are."""
    if os.environ.get(SWITCH, "0") in ("", "0"):
        return f"{SWITCH} is not set: the kernels have never run on a GPU and are off"
    reason = _obstacle(library, sources)
    if reason is None:
        try:
            _show_torch_cuda()
            torch.ops.load_library(str(library))
        except (OSError, RuntimeError) as error:
            reason = f"{library.name} cannot be loaded: {str(error).splitlines()[0]}; {BUILD}"
    if reason is not None:
        logging.getLogger(__name__).warning("no compiled kernels, plain torch runs instead: %s", reason)
    return reason


def write_label(library: Path, archs: Iterable[str], cuda: str, sources: Path = SOURCES) -> None:
    """Write the label of a library beside it: what `load` needs to decide whether it fits.

    Args:
        library: path of the library; the label has its name with the suffix .json.
        archs: compute capabilities that it has machine code for, such as 80 or 90a.
        cuda: release of the CUDA toolkit that compiled it, such as 13.0.
        sources: folder of the kernel sources, whose hash is stored.
    """
    label = {"sources": sources_hash(sources), "archs": list(archs), "cuda": cuda}
    library.with_suffix(".json").write_text(json.dumps(label) + "\n")


def _obstacle(library: Path, sources: Path) -> str | None:
    """What prevents the library from being used with this torch and these GPUs; None if nothing does."""
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    if not library.exists():
        return f"there is no {library.name}; {BUILD}"
    file = library.with_suffix(".json")
    label = json.loads(file.read_text()) if file.exists() else {}
    if not label or sources.is_dir() and label["sources"] != sources_hash(sources):
        return f"{library.name} was made of other sources than those in csrc/; {BUILD}"
    # The library is linked to its own CUDA runtime. A driver that is new enough for torch's may be too old
    # for it.
    if int(label["cuda"].partition(".")[0]) > int(torch.version.cuda.partition(".")[0]):
        return (f"{library.name} was built by CUDA {label['cuda']}, and this torch by {torch.version.cuda}; "
                f"with that nvcc, {BUILD}")
    for number, (major, minor) in enumerate(_capabilities()):
        if not any(_runs_on(arch, major, minor) for arch in label["archs"]):
            return (f"{library.name} was built for {', '.join(label['archs'])}, "
                    f"and GPU {number} has compute capability {major}.{minor}; "
                    f"python tools/build_cuda.py --archs {major}{minor}{'a' * (major >= 9)} makes it")
    return None


def _capabilities() -> list[tuple[int, int]]:
    """Compute capabilities of the GPUs that this process sees."""
    return [torch.cuda.get_device_capability(number) for number in range(torch.cuda.device_count())]


def _runs_on(arch: str, major: int, minor: int) -> bool:
    """Whether machine code for an architecture runs on a GPU: 80 on 8.0 to 8.9, 90a on 9.0 alone.

    The library holds no PTX that a driver could compile for another GPU.
    """
    match = re.fullmatch(r"(\d+)([a-z]?)", arch)
    assert match is not None, arch
    number, own = match.groups()
    of_major, of_minor = divmod(int(number), 10)
    return of_major == major and (of_minor == minor if own == "a" else of_minor <= minor)


def _show_torch_cuda() -> None:
    """Make the symbols of libtorch_cuda visible to a library that was linked against torch's CPU wheel.

    Such a library does not name libtorch_cuda as a dependency.
    """
    torch_cuda = Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"
    if torch_cuda.exists():
        ctypes.CDLL(str(torch_cuda), mode=ctypes.RTLD_GLOBAL)


_REASON, _DEVICE = load(), "cuda"


def absent() -> str | None:
    """Why the compiled kernels are not in use; None when they are."""
    return _REASON


def kernels_for(tensor: Tensor) -> bool:
    """Whether compiled kernels are in use for the device of this tensor."""
    return _REASON is None and tensor.device.type == _DEVICE
