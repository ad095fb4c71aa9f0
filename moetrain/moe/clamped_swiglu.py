"""Clamped SwiGLU experts with biases, as in GPT-OSS (2508.10925, and its released code).

    g = min(G x + b_g, limit),   u = clip(U x + b_u, -limit, limit)
    y = w (D (g sigmoid(slope g) (u + 1)) + b_d)                    w, gate weight; limit 7, slope 1.702

The gate is clamped from above alone: far below, g sigmoid(slope g) is 0 anyway. With slope 1.702 that factor
is about the GELU of g. The gate weight multiplies the whole output, so b_d as well. Here it is folded in
before D, as in other forms, and once more with b_d, so that its gradient needs no output of an expert.

`gate_up` has the rows of G, then those of U; GPT-OSS's files interleave both (gate in even places). Biases
start at 0.

Shapes: R rows ordered by expert, D model width, F expert width, G = 2F.
"""

import torch
from torch import Tensor

from moetrain.moe.expert_form import ExpertForm, StackedParameters, weighted
from moetrain.ops.clamped_swiglu import clamped_swiglu


class ClampedSwiglu(ExpertForm):
    """SwiGLU with biases, clamps, and 1 added to the linear half.

    Args:
        dim: D.
        expert_dim: F.
        limit: bound of the gate from above, and of the linear half in size (`swiglu_limit`).
        slope: factor inside the sigmoid.
    """

    SHAPES = {"gate_up": ("2F", "D"), "gate_up_bias": ("2F",), "down": ("D", "F"), "down_bias": ("D",)}
    KEPT = ("3F", "2D")
    BOUNDS = {"limit": "above 0", "slope": "above 0"}

    def __init__(self, *, dim: int, expert_dim: int, limit: float = 7.0, slope: float = 1.702) -> None:
        super().__init__(dim=dim, expert_dim=expert_dim)
        self.limit, self.slope = limit, slope

    def matrix_rows(self) -> dict[str, list[int]]:
        return {"gate_up": [self.expert_dim] * 2}

    def rows(self, x_RD: Tensor, weights_R: Tensor, experts: StackedParameters) -> Tensor:
        out_RD = experts.linear("down", self._activated(x_RD, weights_R, experts))
        return out_RD + weighted(experts.vectors("down_bias", out_RD), weights_R)

    def hidden(self, x_RD: Tensor, weights_R: Tensor, experts: StackedParameters) -> Tensor:
        return self._activated(x_RD, torch.ones_like(weights_R), experts)

    def _activated(self, x_RD: Tensor, weights_R: Tensor, experts: StackedParameters) -> Tensor:
        gate_up_RG = experts.linear("gate_up", x_RD) + experts.vectors("gate_up_bias", x_RD)
        return clamped_swiglu(gate_up_RG, weights_R, self.limit, self.slope)
