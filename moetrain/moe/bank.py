"""Expert parameters of one layer on this position, and the five hooks that bring in copies of other experts.

`ExpertBank` owns the parameters of the experts whose home is here. Under expert parallelism (`ep`) its hooks
do nothing. Under `fssdp`, parallel/fssdp/copies.py sets `copies`, and the hooks delegate to it:

    prefetch                    model/transformer.py, before attention
                                start the sparse all-gather of copies
    reduce_grads_in_backward    moe/layer.py, on tokens before dispatch
                                in backward, start the sparse reduce-scatter of the copies' gradients
    wait                        moe/experts.py, before the grouped product
                                wait for copies; in backward, accumulate their gradients
    regather_in_backward        moe/experts.py, around the grouped product
                                make autograd save a copy's strides and offset instead of the copy
    release_after_forward       moe/experts.py, after the grouped product
                                drop copies; in backward, start to gather them again

The bank itself knows of no other position. It stores one stacked Parameter for each matrix. Where experts
may be sliced, it stores a second one for this position's slices. parallel/state_shards.py alone maps these to
the names under which tensors are initialized and saved: layer, expert id and matrix. A position may own no
expert.

Shapes: e experts on this rank, c copies, T tokens, D model width, F expert width, G = 2F, N rows that
arrived, R rows ordered by expert.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from moetrain.plan.placement import slice_rows

MATRICES = ("gate_up", "down")
SLICES = ("gate_up_slices", "down_slices")   # this position's slices of sliced experts

CopiedMatrices = tuple[Tensor, Tensor]       # gate_up [c, G, D], down [c, D, F]


class Copies(Protocol):
    """Copies of experts of other positions, for one layer. The methods are the hooks of `ExpertBank`."""

    def prefetch(self) -> None: ...
    def wait(self, x_ND: Tensor) -> tuple[Tensor, CopiedMatrices | None]: ...
    def regather_in_backward(self) -> AbstractContextManager[None]: ...
    def release_after_forward(self, out_RD: Tensor) -> Tensor: ...
    def reduce_grads_in_backward(self, x_TD: Tensor) -> Tensor: ...


class ExpertBank(nn.Module):
    """Parameters of the experts of one layer that this position holds.

    Args:
        experts: global ids of the experts held here whole, ascending.
        dim: model width D.
        expert_dim: expert width F.
        cut: (position, positions) if experts may be sliced (plan/placement.py). This position then holds
            rows of both matrices of every expert in `sliced`, which is empty at first. None: never sliced.
    """

    def __init__(self, *, experts: tuple[int, ...], dim: int, expert_dim: int,
                 cut: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.experts = experts
        self.gate_up = nn.Parameter(torch.empty(len(experts), 2 * expert_dim, dim))
        self.down = nn.Parameter(torch.empty(len(experts), dim, expert_dim))
        self.cut = cut
        self.sliced: tuple[int, ...] = ()
        if cut is not None:
            self.gate_up_slices = nn.Parameter(torch.empty(0, len(slice_rows(2 * expert_dim, *cut)), dim))
            self.down_slices = nn.Parameter(torch.empty(0, len(slice_rows(dim, *cut)), expert_dim))
        self.copies: Copies | None = None

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Rows and columns of an expert's matrices, in the order of `MATRICES`."""
        return [tuple(getattr(self, matrix).shape[1:]) for matrix in MATRICES]

    @property
    def trainable(self) -> tuple[str, ...]:
        """The matrices that are not frozen, in the order of `MATRICES`."""
        return tuple(matrix for matrix in MATRICES if getattr(self, matrix).requires_grad)

    def prefetch(self) -> None:
        """Start gathering copies. Does not wait."""
        if self.copies is not None:
            self.copies.prefetch()

    def wait(self, x_ND: Tensor) -> tuple[Tensor, CopiedMatrices | None]:
        """Wait for copies; return the rows and the copies' matrices, or None without copies.

        The rows pass through an autograd node, so that its backward runs on every rank.
        """
        return (x_ND, None) if self.copies is None else self.copies.wait(x_ND)

    def regather_in_backward(self) -> AbstractContextManager[None]:
        """Context in which autograd saves the geometry of a copy instead of the copy.

        Does nothing unless copies are dropped after forward and gathered again in backward.
        """
        return nullcontext() if self.copies is None else self.copies.regather_in_backward()

    def release_after_forward(self, out_RD: Tensor) -> Tensor:
        """Drop copies that are gathered again in backward.

        The outputs [R, D] pass through an autograd node, whose backward starts the second gather.
        """
        return out_RD if self.copies is None else self.copies.release_after_forward(out_RD)

    def reduce_grads_in_backward(self, x_TD: Tensor) -> Tensor:
        """Pass tokens [T, D] through an autograd node on their way to dispatch.

        Its backward runs after the gradients of all rows have arrived. It starts sending the gradients of
        copies to their homes.
        """
        return x_TD if self.copies is None else self.copies.reduce_grads_in_backward(x_TD)


def is_expert_parameter(model: nn.Module) -> Callable[[nn.Parameter], bool]:
    """Make a predicate that tells the parameters of routed experts from the others of the model."""
    owned = {id(p) for m in model.modules() if isinstance(m, ExpertBank) for p in m.parameters()}
    return lambda parameter: id(parameter) in owned
