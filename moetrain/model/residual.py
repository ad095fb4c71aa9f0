"""Residual MoE: a dense network of an expert's shape beside the experts, which every token takes.

    summed    y = MoE(x) + MLP(x)                                        OpenMoE (arXiv 2402.01739)
    learned   y = c_0 MoE(x) + c_1 MLP(x),  c = softmax(W_c x + b_c)     DeepSpeed-MoE (arXiv 2201.05596)

With another number of experts in each layer (`model.num_experts` as a list) it is PR-MoE, the pyramid.

DeepSpeed's layer mixes in the dtype of the model; here c is computed in float32 or better, as gate weights
are. There, W_c and b_c start as torch's linear layers do; here W_c starts as other matrices, and b_c at 0.
The network is SwiGLU, whatever the form of the experts.

Shapes: T tokens, D model width, F hidden width.
"""

import torch.nn.functional as F
from torch import Tensor

from moetrain.model.feed_forward import FeedForward
from moetrain.model.projection import Projection
from moetrain.moe.wrappers import LayerWrapper
from moetrain.routers.base import Routing


class SummedResidual(LayerWrapper):
    """Dense network whose output is added to that of the experts.

    Args:
        dim: D.
        hidden_dim: F.
    """

    reads_outputs = False                                # a sum

    def __init__(self, *, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.dense = FeedForward(dim=dim, hidden_dim=hidden_dim)

    def beside(self, x_TD: Tensor, routing: Routing) -> Tensor:
        return self.dense(x_TD)

    def leaving(self, out_TD: Tensor, x_TD: Tensor, routing: Routing, beside_TD: Tensor | None) -> Tensor:
        assert beside_TD is not None
        return out_TD + beside_TD


class MixedResidual(SummedResidual):
    """Dense network mixed with the experts by two learned shares that sum to 1. Arguments as above."""

    reads_outputs = True

    def __init__(self, *, dim: int, hidden_dim: int) -> None:
        super().__init__(dim=dim, hidden_dim=hidden_dim)
        self.mixing = Projection(in_dim=dim, out_dim=2, bias=True)

    def leaving(self, out_TD: Tensor, x_TD: Tensor, routing: Routing, beside_TD: Tensor | None) -> Tensor:
        assert beside_TD is not None and self.mixing.bias is not None
        wide = self.mixing.weight.dtype                  # float32 or better
        logits_T2 = F.linear(x_TD.to(wide), self.mixing.weight, self.mixing.bias)
        shares_T2 = logits_T2.softmax(-1)
        return (shares_T2[:, :1] * out_TD + shares_T2[:, 1:] * beside_TD).to(out_TD.dtype)
