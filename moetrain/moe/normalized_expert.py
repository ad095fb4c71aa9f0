"""SwiGLU experts whose outputs are normalized, each by a scale of its own.

    y = w * s_e * n / rms(n),   n = down_e(silu(gate_e x) * (up_e x))        w, gate weight; s_e [D], scale

HoME (arXiv 2408.05430) found experts of one layer with outputs of very different sizes, so that a gate
chooses by size, and normalizes each expert's output. It does so by batch normalization and an activation
after it, for recommendation. A mean over the batch would make a token depend on others, so here it is the
root mean square of the row, without an activation, since the output is added to the residual stream.

The gate weight is applied after the norm. Folded in before the down projection, as SwigluExpert does it, the
norm would divide it out again, and the router would have no gradient.

Shapes: R rows ordered by expert, D model width, F expert width.
"""

import torch
from torch import Tensor

from moetrain.moe.expert_form import ExpertForm, StackedParameters, weighted
from moetrain.ops.rms_norm import rms_norm
from moetrain.ops.start import Start, constant
from moetrain.ops.swiglu import swiglu


class NormalizedExpert(ExpertForm):
    """SwiGLU, then a root-mean-square norm of each expert's own.

    `gate_up` has gate rows, then up rows.

    Args:
        dim: D.
        expert_dim: F.
        eps: added to the mean square before the root.
    """

    SHAPES = {"gate_up": ("2F", "D"), "down": ("D", "F"), "scale": ("D",)}
    KEPT = ("4F", "5D")
    BOUNDS = {"eps": "above 0"}

    def __init__(self, *, dim: int, expert_dim: int, eps: float = 1e-6) -> None:
        super().__init__(dim=dim, expert_dim=expert_dim)
        self.eps = eps

    def starts(self) -> dict[str, Start]:
        return {**super().starts(), "scale": constant(1.0)}

    def matrix_rows(self) -> dict[str, list[int]]:
        return {"gate_up": [self.expert_dim] * 2}

    def rows(self, x_RD: Tensor, weights_R: Tensor, experts: StackedParameters) -> Tensor:
        out_RD = experts.linear("down", self.hidden(x_RD, weights_R, experts))
        equal_D = torch.ones(self.dim, dtype=weights_R.dtype, device=x_RD.device)
        normed_RD = rms_norm(out_RD, equal_D, self.eps)
        return weighted(normed_RD * experts.vectors("scale", normed_RD), weights_R)

    def hidden(self, x_RD: Tensor, weights_R: Tensor, experts: StackedParameters) -> Tensor:
        return swiglu(experts.linear("gate_up", x_RD))
