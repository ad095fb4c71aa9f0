"""Dense SwiGLU network: the feed-forward part of dense layers, and the shared expert of sparse ones.

    y = down( silu(gate x) * (up x) )
    y = sigmoid(x g) * down( silu(gate x) * (up x) )      with a gate g [D] (Qwen1.5-MoE, Qwen2-MoE)

Qwen's code has the gate in the dtype of the model. Here it is in float32 or better, as gate weights are.

Shapes: T tokens, D model width, F hidden width.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.model.projection import Projection
from moetrain.moe.wrappers import LayerWrapper
from moetrain.ops.start import Start, residual_normal
from moetrain.ops.swiglu import swiglu
from moetrain.routers.base import Routing


class FeedForward(nn.Module):
    """Dense SwiGLU network.

    The projection `gate_up` holds the gate rows, then the up rows.

    Args:
        dim: D.
        hidden_dim: F; of a shared expert, the width of all shared experts together.
    """

    def __init__(self, *, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_up = Projection(in_dim=dim, out_dim=2 * hidden_dim)
        self.down = Projection(in_dim=hidden_dim, out_dim=dim)

    def starts(self) -> dict[str, Start]:
        """How the matrix that writes to the residual stream starts."""
        return {"down.weight": residual_normal(drawn_as="down")}

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., D] to [..., D]."""
        return self.down(swiglu(self.gate_up(x)))


class SharedExpert(FeedForward, LayerWrapper):
    """Expert that every token takes, as a wrapper of its layer."""

    reads_outputs = False                                # a sum

    def beside(self, x_TD: Tensor, routing: Routing) -> Tensor:
        return self(x_TD)

    def leaving(self, out_TD: Tensor, x_TD: Tensor, routing: Routing, beside_TD: Tensor | None) -> Tensor:
        assert beside_TD is not None
        return out_TD + beside_TD


class GatedSharedExpert(SharedExpert):
    """Shared expert whose output each token multiplies by a gate between 0 and 1. Arguments as above."""

    def __init__(self, *, dim: int, hidden_dim: int) -> None:
        super().__init__(dim=dim, hidden_dim=hidden_dim)
        self.gate = Projection(in_dim=dim, out_dim=1)

    def beside(self, x_TD: Tensor, routing: Routing) -> Tensor:
        logit_T1 = F.linear(x_TD.to(self.gate.weight.dtype), self.gate.weight)
        return (logit_T1.sigmoid() * self(x_TD)).to(x_TD.dtype)
