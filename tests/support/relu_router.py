"""ReLU routing (routers/relu.py) in which tokens use none, a few or all of the experts, by their position."""

import torch
from torch import Tensor

from moetrain.config.schema import Config
from moetrain.model.transformer import Transformer
from moetrain.routers import relu
from moetrain.routers.base import RouterContext, Scores

ALL, NONE = 1, 2             # positions, modulo 5, at which a token uses all experts, and none


class ReluRouter(relu.ReluRouter):
    """Logits z - 1/2, or far above or below 0."""

    def bias(self, logits_TE: Tensor, context: RouterContext) -> Tensor:
        shift_T = torch.full_like(logits_TE[:, 0], -0.5)
        if context.positions_T is not None:
            kind_T = context.positions_T % 5
            shift_T = shift_T.where(kind_T != ALL, 9.0).where(kind_T != NONE, -99.0)
        return shift_T[:, None]

    def scores(self, x_TD: Tensor, context: RouterContext) -> Scores:
        logits_TE = self.logits(x_TD)
        return self.scores_of(logits_TE + self.bias(logits_TE, context))


def use_relu_routers(model: Transformer, config: Config) -> None:
    """`convert_model` that gives every MoE layer such a router."""
    for block in model.layers:
        if block.moe is not None:
            old = block.moe.router
            block.moe.router = ReluRouter(dim=config.model.dim, num_experts=old.num_experts, top_k=2)
