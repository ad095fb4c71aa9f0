"""Router with a hidden layer, and the other gates of ModuleFormer.

    mlp      z = V gelu(x W^T + b),         V [E, H], dropout on the hidden layer in training
    linear   z = x V^T,                     V [E, D], which is topk
    gmm      z = exp(t) cos(x W^T, V_i),    V [E, H], a learned temperature t that starts at 0

    p = softmax(z);  the k largest p are chosen; the gate weights are p at the chosen ids

With `sample_topk` = s, in training the k - s most probable experts are chosen, and s others are drawn from
the rest without replacement, each next one by p + 1e-6 (a Gumbel number on the logarithm is such a draw). Its
balance loss is `loss=mutual_information`; the other one of the release is the balance loss beside 0.1 of the
z-loss.

Shen et al. 2023, "ModuleFormer" (arXiv 2306.04640), and its released code (IBM/ModuleFormer): a hidden layer
of 256, no dropout, no sampling, and raw weights, whose renormalization is disabled there. The exact GELU, as
there. Random numbers are keyed (ops/keyed_random.py), so that they are the same on every mesh.

Shapes: T tokens, D model width, E experts, K slots, H hidden width.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, normalize

from moetrain.errors import ConfigError
from moetrain.ops.gating import largest, shares
from moetrain.ops.keyed_random import gumbel, uniform
from moetrain.ops.start import Start, constant, normal
from moetrain.routers.base import LinearRouter, RouterContext, Scores

_FLOOR = 1e-6                                # the release's: an expert of probability 0 can be drawn


class MLPRouter(LinearRouter):
    """Softmax top-k router on a hidden layer.

    Args:
        dim: D.
        num_experts: E.
        top_k: K, number of slots of a token.
        hidden: H, width of the hidden layer, or of the projection of gmm.
        dropout: share of the hidden layer that is dropped in training; with kind=mlp.
        sample_topk: number of the k experts that are drawn at random in training.
        kind: mlp, linear or gmm.
        weights: convention of the gate weights: raw, or renorm (chosen ones sum to 1).
    """

    BOUNDS = {"hidden": "1 or more", "dropout": "in [0, 1)", "sample_topk": "0 or more"}
    CONSTANT_WEIGHTS = {"weights": ["renorm"]}
    SHAPES = {"weight": ("E", "D if kind == 'linear' else hidden"),
              "project": ("0 if kind == 'linear' else hidden", "D"),
              "bias": ("hidden if kind == 'mlp' else 0",), "temperature": ("1 if kind == 'gmm' else 0",)}
    depends_on = frozenset({"sample_ids_T", "positions_T"})

    def __init__(self, *, dim: int, num_experts: int, top_k: int, hidden: int = 256, dropout: float = 0.0,
                 sample_topk: int = 0, kind: Literal["mlp", "linear", "gmm"] = "mlp",
                 weights: Literal["raw", "renorm"] = "raw") -> None:
        super().__init__(dim=dim if kind == "linear" else hidden, num_experts=num_experts, top_k=top_k)
        assert kind in ("mlp", "linear", "gmm") and weights in ("raw", "renorm"), (kind, weights)
        if sample_topk > top_k:
            raise ConfigError(
                266, f"router.sample_topk={sample_topk} of model.top_k={top_k} experts",
                where="router.sample_topk, model.top_k",
                why="it is the number of a token's experts that are drawn at random",
                next=f"router.sample_topk={top_k} or less")
        self.hidden, self.dropout, self.sample_topk = hidden, dropout, sample_topk
        self.kind, self.weights = kind, weights
        if kind != "linear":
            self.project = nn.Parameter(torch.empty(hidden, dim))
        if kind == "mlp":
            self.bias = nn.Parameter(torch.empty(hidden))
        if kind == "gmm":
            self.temperature = nn.Parameter(torch.empty(1))

    def starts(self) -> dict[str, Start]:
        kinds: dict[str, dict[str, Start]] = {
            "mlp": {"project": normal(), "bias": constant(0)}, "linear": {},
            "gmm": {"project": normal(), "weight": normal(1.0), "temperature": constant(0)}}
        return {**super().starts(), **kinds[self.kind]}

    def scores(self, x_TD: Tensor, context: RouterContext) -> Scores:
        """Score experts by their probability."""
        logits_TE = self.logits_of(x_TD, context)
        probs_TE = logits_TE.softmax(-1)
        return Scores(probs_TE, probs_TE, logits_TE)

    def logits_of(self, x_TD: Tensor, context: RouterContext) -> Tensor:
        """Compute the logits [T, E] by `kind`."""
        if self.kind == "linear":
            return self.logits(x_TD)
        x_TD = x_TD.to(self.project.dtype)
        if self.kind == "gmm":
            x_TH, centers_EH = normalize(linear(x_TD, self.project), dim=-1), normalize(self.weight, dim=-1)
            return linear(x_TH, centers_EH) * self.temperature.exp()
        hidden_TH = gelu(linear(x_TD, self.project, self.bias))
        if self.dropout and context.training:
            drawn_TH = uniform(context, self.hidden, use="dropout", dtype=hidden_TH.dtype)
            hidden_TH = hidden_TH * (drawn_TH >= self.dropout) / (1 - self.dropout)
        return self.logits(hidden_TH)

    def choose(self, order_TC: Tensor | None, context: RouterContext) -> Tensor:
        """Choose the most probable experts, and in training draw `sample_topk` of them."""
        assert order_TC is not None
        if not self.sample_topk or not context.training:
            return super().choose(order_TC, context)
        order_TC = order_TC.detach()
        first_TK = largest(order_TC, self.top_k - self.sample_topk)
        noise_TC = gumbel(context, self.num_choices, use="sample", dtype=order_TC.dtype)
        noisy_TC = (order_TC.clamp(min=0) + _FLOOR).log() + noise_TC
        never_TC = (order_TC == float("-inf")).scatter(1, first_TK.clamp(min=0), True)
        drawn_TK = largest(noisy_TC.masked_fill(never_TC, float("-inf")), self.sample_topk)
        return torch.cat([first_TK, drawn_TK], 1)

    def weigh(self, scores: Scores, ids_TK: Tensor, context: RouterContext) -> Tensor:
        """Compute gate weights by the convention `weights`."""
        weights_TK = super().weigh(scores, ids_TK, context)
        return weights_TK if self.weights == "raw" else shares(weights_TK)

    def probabilities(self, scores: Scores) -> Tensor | None:
        """Return the softmax as it is."""
        return scores.gates_TC
