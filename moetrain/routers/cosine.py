"""Cosine routing in a narrow space (X-MoE, Chi et al., 2204.09179).

    y = x P^T,  z_i = <y / |y|, e_i / |e_i|> s,  s = min(exp(a), max_scale);  then as topk (routers/topk.py)

The learned temperature 1 / s starts at `init_temperature`, and the space has half as many dimensions as
there are experts, as in the paper. A linear router pulls the tokens of an expert towards its vector, so that
representations collapse into the span of few vectors; here only the angle in a narrow space counts.

Two releases differ. Tutel normalizes both sides, keeps a as the parameter, and s at 100 or less; this file
does the same. Its P has a bias, which is left out: with it, the logits depend on the length of x. torchscale
(normalize_input=false) normalizes the experts alone, and writes vectors of length 1.5 into its parameter in
every forward pass. Here nothing is written: the normalization that follows would undo it anyway.

Shapes: T tokens, D model width, E experts, P width of the space.
"""

from math import log
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from moetrain.ops.start import Start, constant, normal
from moetrain.routers.topk import TopKRouter


class CosineRouter(TopKRouter):
    """Router with cosines of a projected token and vectors of the experts.

    Args:
        dim: D.
        num_experts: E.
        top_k: K, number of slots of a token.
        proj_dim: P; None is half of the experts.
        init_temperature: temperature at the start.
        max_scale: largest factor of a cosine, 1 over the temperature.
        normalize_input: normalize tokens as well as experts.
        weights: convention of the gate weights: renorm, raw or softmax_of_topk.
    """

    BOUNDS = {"proj_dim": "1 or more", "init_temperature": "above 0", "max_scale": "above 0"}
    START_ARGUMENTS = ("init_temperature",)
    CONSTANT_WEIGHTS = {"weights": ["renorm", "softmax_of_topk"]}
    SHAPES = {"weight": ("E", "proj_dim or max(1, E // 2)"),
              "projection": ("proj_dim or max(1, E // 2)", "D"), "log_scale": (1,)}
    depends_on = frozenset()

    def __init__(self, *, dim: int, num_experts: int, top_k: int, proj_dim: int | None = None,
                 init_temperature: float = 0.5, max_scale: float = 100.0, normalize_input: bool = True,
                 weights: Literal["renorm", "raw", "softmax_of_topk"] = "renorm") -> None:
        width = max(1, num_experts // 2) if proj_dim is None else proj_dim
        super().__init__(dim=width, num_experts=num_experts, top_k=top_k, weights=weights)
        self.init_temperature, self.max_scale = init_temperature, max_scale
        self.normalize_input = normalize_input
        self.projection = nn.Parameter(torch.empty(width, dim))
        self.log_scale = nn.Parameter(torch.empty(1))

    def starts(self) -> dict[str, Start]:
        return {**super().starts(), "projection": normal(),
                "log_scale": constant(-log(self.init_temperature))}

    def logits(self, x_TD: Tensor) -> Tensor:
        """Compute cosines times the learned factor, [T, E]."""
        y_TP = linear(x_TD.to(self.projection.dtype), self.projection)
        if self.normalize_input:
            y_TP = normalize(y_TP, dim=-1)
        scale = self.log_scale.clamp(max=log(self.max_scale)).exp()
        return linear(y_TP, normalize(self.weight, dim=-1) * scale)
