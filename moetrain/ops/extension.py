"""The library that holds the schemas of our ops, and the compiled kernels when there are any.

Every op is defined here by schema (`define`), so that it exists without a compiler; its file in `ops/` adds the
plain-torch reference, the fake and the gradient. A compiled `csrc/<op>.cu` only adds a CUDA implementation to the same op.

The kernels have never run on a GPU. They are off unless the environment says MOETRAIN_KERNELS=1, and are then loaded from
the library that tools/build_cuda.py made, on a torch with CUDA alone. Whatever stands in the way is one warning, and
everything runs on the references, with the same results.
"""

import ctypes
import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

SWITCH = "MOETRAIN_KERNELS"
LIBRARY = Path(__file__).parents[1] / "_C_cuda.so"        # tools/build_cuda.py writes it, and its sources' hash beside it
SOURCES = Path(__file__).parents[2] / "csrc"              # of a checkout; an installed package has none

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

    reference: plain torch, on any device. fake: shapes alone (the reference itself when it is free of data-dependent
    sizes). backward, setup_context: as in `torch.library.register_autograd`; absent for ops without gradient.
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
    """What the kernels are made of: names and contents of the files in csrc/."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.cu"), *folder.glob("*.cuh"), *folder.glob("*.h")]):
        digest.update(f"{path.name}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def load(library: Path = LIBRARY, sources: Path = SOURCES) -> str | None:
    """Load the compiled kernels; why they are not in use, or None when they are."""
    if os.environ.get(SWITCH, "0") in ("", "0"):
        return f"{SWITCH} is not set: the kernels have never run on a GPU and are off"
    reason = _obstacle(library, sources)
    if reason is None:
        try:
            _show_torch_cuda()
            torch.ops.load_library(str(library))
        except (OSError, RuntimeError) as error:
            reason = f"{library.name} cannot be loaded: {error}"
    if reason is not None:
        logging.getLogger(__name__).warning("no compiled kernels, plain torch runs instead: %s", reason)
    return reason


def _obstacle(library: Path, sources: Path) -> str | None:
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    build = "python tools/build_cuda.py makes it"
    if not library.exists():
        return f"there is no {library.name}; {build}"
    stamp = library.with_suffix(".hash")
    if sources.is_dir() and (not stamp.exists() or stamp.read_text().strip() != sources_hash(sources)):
        return f"{library.name} was made of other sources than those in csrc/; {build}"
    return None


def _show_torch_cuda() -> None:
    """A library that was linked against torch's CPU wheel does not name libtorch_cuda: let it find the symbols all the same."""
    torch_cuda = Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"
    if torch_cuda.exists():
        ctypes.CDLL(str(torch_cuda), mode=ctypes.RTLD_GLOBAL)


_REASON, _DEVICE = load(), "cuda"


def absent() -> str | None:
    """Why no compiled kernel is in use; None when they are."""
    return _REASON


def kernels_for(tensor: Tensor) -> bool:
    """Whether compiled kernels take what lies where this tensor does."""
    return _REASON is None and tensor.device.type == _DEVICE
