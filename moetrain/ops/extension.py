"""The library that holds the schemas of our ops, and the compiled extension when there is one.

Every op is defined here by schema (`define`), so that it exists without a compiler; its file in `ops/` adds the
plain-torch reference, the fake and the gradient. A compiled `csrc/<op>.cu` would only add a CUDA implementation to the
same op. No extension is part of this release: `absent()` says so, and everything runs on the references.
"""

from collections.abc import Callable

import torch

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


def absent() -> str:
    """Why no compiled kernel is in use."""
    return "no compiled extension in this release: the plain-torch references run"
