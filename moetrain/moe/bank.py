"""The memory of the experts that this position holds.

`ExpertBank` owns the expert parameters of one layer, those whose home is here. The layer sees two seams: `post` at the
block's start, before attention, and `take` between dispatch and experts. Under plain expert parallelism both do nothing.
Where experts are copied to other positions (parallel/fssdp/copies.py), `copies` starts bringing them here in the first and waits
in the second; the bank itself knows of none.

How the bank stores its experts (one stacked Parameter per matrix, and one of pieces) concerns parallel/state_shards.py alone, which names every
tensor as it is initialised and saved: by layer, expert id and matrix. A position may own no expert.

Shapes: e experts on this rank, c copies, D model width, F expert width, G = 2F, N rows.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from moetrain.plan.placement import slice_rows

MATRICES = ("gate_up", "down")
PIECES = ("gate_up_pieces", "down_pieces")   # of the same, where experts may be sliced


class Taken(NamedTuple):
    """The rows passed through, and the copies that are here for them."""

    x_ND: Tensor
    copies: tuple[Tensor, Tensor] | None     # gate_up [c, G, D], down [c, D, F]


class Copies(Protocol):
    """Experts of other positions, for one layer."""

    def post(self) -> None:
        """Start bringing them."""

    def take(self, x_ND: Tensor) -> Taken:
        """Wait for them. The rows pass through, so that backward comes by here on every rank."""

    def saving(self) -> AbstractContextManager[None]:
        """Around the computation with them: how they are kept for backward."""

    def leave(self, rows_RD: Tensor) -> Tensor:
        """The outputs pass through: where backward begins to need them."""

    def depart(self, x_TD: Tensor) -> Tensor:
        """The tokens pass through on their way to dispatch: where backward is done with the layer's own exchanges."""


class ExpertBank(nn.Module):
    """experts: global ids of the experts held here whole, ascending.

    cut: (position, positions) where experts may be sliced: this position then has rows of both matrices of all those in
    `sliced`, at first none (plan/placement.py).
    """

    def __init__(self, *, experts: tuple[int, ...], dim: int, expert_dim: int, cut: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.experts = experts
        self.gate_up = nn.Parameter(torch.empty(len(experts), 2 * expert_dim, dim))
        self.down = nn.Parameter(torch.empty(len(experts), dim, expert_dim))
        self.cut, self.sliced = cut, ()
        if cut is not None:
            self.gate_up_pieces = nn.Parameter(torch.empty(0, len(slice_rows(2 * expert_dim, *cut)), dim))
            self.down_pieces = nn.Parameter(torch.empty(0, len(slice_rows(dim, *cut)), expert_dim))
        self.copies: Copies | None = None

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Rows and columns of an expert's matrices."""
        return [tuple(getattr(self, matrix).shape[1:]) for matrix in MATRICES]

    def post(self) -> None:
        """Start bringing copies here. Plain expert parallelism has none."""
        if self.copies is not None:
            self.copies.post()

    def depart(self, x_TD: Tensor) -> Tensor:
        """Tokens on their way to dispatch: in backward, gradients of copies leave after theirs have arrived."""
        return x_TD if self.copies is None else self.copies.depart(x_TD)


def is_expert_parameter(model: nn.Module) -> Callable[[nn.Parameter], bool]:
    """Whether a parameter of the model belongs to routed experts."""
    owned = {id(p) for m in model.modules() if isinstance(m, ExpertBank) for p in m.parameters()}
    return lambda parameter: id(parameter) in owned
