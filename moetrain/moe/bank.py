"""The memory of the experts that this position holds.

`ExpertBank` owns the expert parameters of one layer. The layer sees two seams: `post` at the block's start, before
attention, and `take` between dispatch and experts. Under plain expert parallelism homes never move and both do nothing.

How the bank stores its experts (one stacked Parameter per matrix) concerns parallel/pieces.py alone, which names every
tensor as it is initialised and saved: by layer, expert id and matrix. A position may own no expert.

Shapes: e experts on this rank, D model width, F expert width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

MATRICES = ("gate_up", "down")


class ExpertBank(nn.Module):
    """experts: global ids of the experts held here, ascending."""

    def __init__(self, *, experts: tuple[int, ...], dim: int, expert_dim: int) -> None:
        super().__init__()
        self.experts = experts
        self.gate_up = nn.Parameter(torch.empty(len(experts), 2 * expert_dim, dim))
        self.down = nn.Parameter(torch.empty(len(experts), dim, expert_dim))

    def post(self) -> None:
        """Start bringing copies here. Plain expert parallelism has none."""

    def take(self, rows_RD: Tensor) -> Tensor:
        """Wait for copies; the rows pass through. Plain expert parallelism has none to wait for."""
        return rows_RD


def is_expert_parameter(model: nn.Module) -> Callable[[nn.Parameter], bool]:
    """Whether a parameter of the model belongs to routed experts."""
    owned = {id(p) for m in model.modules() if isinstance(m, ExpertBank) for p in m.parameters()}
    return lambda parameter: id(parameter) in owned
