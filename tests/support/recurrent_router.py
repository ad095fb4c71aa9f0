"""Routers with a recurrent state over layers, as in RMoE, on torch's own cell, which writes in place."""

from torch import Tensor, nn

from moetrain.config.schema import Config
from moetrain.model.transformer import Transformer
from moetrain.ops.start import Start, normal
from moetrain.routers.base import RouterContext, Routing
from moetrain.routers.topk import TopKRouter

STATE = 6


class Cell(nn.GRUCell):
    """Cell whose matrices and biases start like the matrices of the model."""

    def starts(self) -> dict[str, Start]:
        return {name: normal() for name, _ in self.named_parameters()}


class RecurrentRouter(TopKRouter):
    """Top-k by a state that each layer's router hands to the next one's: h = cell(x, h), z = h W^T.

    Args:
        dim: D.
        num_experts: E.
        top_k: K.
        cell: the router's own cell; None shares one with all routers.
    """

    def __init__(self, *, dim: int, num_experts: int, top_k: int, cell: Cell | None) -> None:
        super().__init__(dim=STATE, num_experts=num_experts, top_k=top_k)
        self.cell, self.dim = cell, dim

    def shared_modules(self) -> dict[str, nn.Module]:
        return {"cell": Cell(self.dim, STATE)} if self.cell is None else {}

    def route(self, x_TD: Tensor, context: RouterContext) -> Routing:
        cell = self.shared("cell", context) if self.cell is None else self.cell
        state_TH = cell(x_TD.to(self.weight.dtype), context.carry)
        return super().route(state_TH, context)._replace(carry=state_TH)


def _replace_routers(model: Transformer, cells: list[Cell | None]) -> None:
    for block, cell in zip(model.layers, cells, strict=True):
        old = block.moe.router
        block.moe.router = RecurrentRouter(dim=model.embed.shape[1], num_experts=old.num_experts,
                                           top_k=old.top_k, cell=cell)


def own_cells(model: Transformer, config: Config) -> None:
    """Every router has a cell of its own."""
    _replace_routers(model, [Cell(config.model.dim, STATE) for _ in model.layers])


def tied_cell(model: Transformer, config: Config) -> None:
    """The model holds one cell at its root for all routers."""
    _replace_routers(model, [None] * len(model.layers))


def cell_in_blocks(model: Transformer, config: Config) -> None:
    """All routers hold the same cell."""
    _replace_routers(model, [Cell(config.model.dim, STATE)] * len(model.layers))
