"""LatentMoE: the experts work in a space narrower than the model (arXiv 2601.18089, 2026).

    y = W_up ( sum_i g_i E_i(W_down x) )        W_down [l, D], W_up [D, l]

The router and shared experts read x itself. A row that travels to an expert has l numbers instead of D, so
exchanges, and the input and output sides of every expert, shrink by D / l. The sum over a token's experts is
taken in the narrow space, so W_up is applied once a token.

The matrices that experts end with start smaller, since they usually write to the residual stream
(moe/expert_form.py). W_up, which does it here, starts as other matrices do, so the factor is taken once.

Shapes: T tokens, D model width, l latent width.
"""

from torch import Tensor

from moetrain.model.projection import Projection
from moetrain.moe.wrappers import LayerWrapper
from moetrain.routers.base import Routing


class LatentSpace(LayerWrapper):
    """Projection of tokens to the width of the experts, and of their sum back.

    Args:
        dim: D.
        latent_dim: l.
    """

    reads_outputs = True                                 # for the gradient of `up`

    def __init__(self, *, dim: int, latent_dim: int) -> None:
        super().__init__()
        self.down = Projection(in_dim=dim, out_dim=latent_dim)
        self.up = Projection(in_dim=latent_dim, out_dim=dim)

    def entering(self, x_TD: Tensor, routing: Routing) -> Tensor:
        return self.down(x_TD)

    def leaving(self, out_TD: Tensor, x_TD: Tensor, routing: Routing, beside_TD: Tensor | None) -> Tensor:
        return self.up(out_TD)
