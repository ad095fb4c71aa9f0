"""A router of K = E whose tokens use what is positive: none, a few or all of the experts."""

import torch
from torch import Tensor

from moetrain.config.schema import Config
from moetrain.model.transformer import Transformer
from moetrain.ops.gating import decide, gather_weights, top_k
from moetrain.routers.base import RouterContext, Routing, drop_padding
from moetrain.routers.topk import TopKRouter

ALL, NONE = 1, 2             # positions, modulo 5, at which a token uses all experts, and none


class ReluRouter(TopKRouter):
    """Gate weights relu(z - 1/2), for every expert where they are above 0, largest first."""

    uses_few_slots = True

    def route(self, x_TD: Tensor, context: RouterContext) -> Routing:
        logits_TE = self.logits(x_TD)
        shift_T = torch.full_like(logits_TE[:, 0], -0.5)
        if context.positions_T is not None:
            kind_T = context.positions_T % 5
            shift_T = shift_T.where(kind_T != ALL, 9.0).where(kind_T != NONE, -99.0)
        gates_TE = (logits_TE + shift_T[:, None]).relu()
        sorted_TK, ids_TK = top_k(gates_TE, self.top_k)
        ids_TK = decide(drop_padding(ids_TK.where(sorted_TK > 0, -1), context))
        weights_TK = gather_weights(gates_TE, ids_TK)
        return self.routing(ids_TK, weights_TK, logits_TE.softmax(-1), logits_TE, context)


def use_relu_routers(model: Transformer, config: Config) -> None:
    """`convert_model` that gives every MoE layer such a router."""
    for block in model.layers:
        if block.moe is not None:
            old = block.moe.router
            block.moe.router = ReluRouter(dim=config.model.dim, num_experts=old.num_experts,
                                          top_k=old.num_experts)
