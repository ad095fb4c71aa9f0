"""Union-of-Experts' feed-forward network: experts are the slices of one dense network.

A dense SwiGLU network of width E F is cut as tensor parallelism cuts it: slice i has rows i F to (i + 1) F of
gate and up, and the same columns of down. The outputs of a token's slices are summed,

    y = sum_{i chosen} E g_i E_i(x)         g_i, gate weight of the router

so that with all slices chosen and equal weights the layer is the dense network.

The released code (YujiaoYang-work/UoE) differs in three ways that are not followed: it lets the router of a
sequence see later tokens; it normalizes its gates over the batch; and it does not multiply outputs by the
gates, so that its router has no gradient. Choice by tokens of a whole sequence is a matter of the router here
(router=expert_choice).

Shapes: T tokens, E experts (slices), F width of a slice, K slots.
"""

from torch import Tensor

from moetrain.moe.wrappers import LayerWrapper
from moetrain.routers.base import RouterContext, Routing


class SliceWeights(LayerWrapper):
    """Gate weights times the number of slices.

    Args:
        num_slices: E.
    """

    reads_outputs = False

    def __init__(self, *, num_slices: int) -> None:
        super().__init__()
        self.num_slices = num_slices

    def routed(self, routing: Routing, x_TD: Tensor, context: RouterContext) -> Routing:
        return routing._replace(weights_TK=self.num_slices * routing.weights_TK)
