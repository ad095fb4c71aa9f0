"""Top-k by a random matrix that is never trained, with a growing k (SMoE-Dropout).

    z = x W^T + b,  W and b uniform in (-D^-1/2, D^-1/2) and frozen;  the k(s) largest z are chosen;
    the gate weights are `scale` times the softmax of the chosen z

k(s) of step s, between k_min and k_max = model.top_k, which it reaches after S = `growth_steps` (a is the
share s / S):

    linear     round((k_max - k_min) a) + k_min
    cosine     k_max - round((k_max - k_min) cos(pi a / 2))
    exp        k_max - round((k_max - k_min) 0.99^floor(300 a)), which ends 5 % of the way before k_max
    step       k_min, 2 k_min, 4 k_min, ... up to k_max, each for an equal share of the S steps
    none       k_max

Without `growth_steps` S is run.steps. A run that is resumed with more run.steps then has fewer experts than
before, and says so; `router.growth_steps=<its run.steps so far>` keeps the growth.

Chen et al. 2023, 2303.01610. These are the schedules of the released code, whose steps are 1, 2, 4, 8, 16.
Choices drift in training even so, because x does. Weights sum to `scale` whatever k is, and at k = E they are
the softmax over all experts, with which the authors evaluate. Equal weights 1 / E make a network of E slices
the dense one over E: with scale = E it is the dense one.

In evaluation the step is that of the checkpoint, so `moetrain eval model.top_k=4` measures a trained run at
another k ("self-slimmable"). The router does not learn, so a balance loss acts on x alone.

Shapes: T tokens, D model width, E experts, K slots.
"""

import math
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from moetrain.ops.start import Start, values
from moetrain.routers.base import LinearRouter, RouterContext, Routing, Scores, edits_of
from moetrain.routers.edits import RoutingEdits

_LOOKED_AT = 1000            # steps of a resumed run in which another number of experts is searched


class FixedRandomRouter(LinearRouter):
    """Router with a frozen random matrix, whose number of experts a token grows.

    Args:
        dim: D.
        num_experts: E.
        top_k: K, number of experts of a token at the end.
        total_steps: steps of the run.
        k_min: number of experts of a token at the beginning.
        schedule: how the number grows: linear, cosine, exp, step or none.
        growth_steps: S, steps until it has grown; null: those of the run.
        scale: factor of the gate weights.
    """

    BOUNDS = {"k_min": "1 or more", "growth_steps": "1 or more", "scale": "above 0"}
    SHAPES = {"weight": ("E", "D"), "bias": ("E",)}
    choice_tensors = frozenset({"weight", "bias"})

    def __init__(self, *, dim: int, num_experts: int, top_k: int, total_steps: int, k_min: int = 1,
                 schedule: Literal["linear", "cosine", "exp", "step", "none"] = "linear",
                 growth_steps: int | None = None, scale: float = 1.0) -> None:
        super().__init__(dim=dim, num_experts=num_experts, top_k=top_k)
        self.total_steps, self.growth_steps = total_steps, growth_steps
        self.k_min = min(k_min, top_k)                   # evaluation may ask for fewer
        self.schedule, self.scale = schedule, scale
        self.bias = nn.Parameter(torch.empty(num_experts), requires_grad=False)
        self.weight.requires_grad_(False)

    def starts(self) -> dict[str, Start]:
        return {"weight": values(partial(self._uniform, tuple(self.weight.shape))),
                "bias": values(partial(self._uniform, tuple(self.bias.shape)))}

    def _uniform(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        bound = self.weight.shape[1] ** -0.5
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)

    def experts_at(self, step: int, total_steps: int | None = None) -> int:
        """Compute k, the number of experts of a token in a step; with other steps of the run, if given."""
        growth_steps = self.growth_steps or total_steps or self.total_steps
        span, share = self.top_k - self.k_min, min(1.0, step / growth_steps)
        if self.schedule == "linear":
            return round(span * share) + self.k_min
        if self.schedule == "cosine":
            return self.top_k - round(span * math.cos(math.pi * share / 2))
        if self.schedule == "exp":
            return self.top_k - round(span * 0.99 ** int(300 * share))
        if self.schedule == "step":
            doublings = math.ceil(math.log2(self.top_k / self.k_min))
            return min(self.top_k, self.k_min << min(doublings, int((doublings + 1) * share)))
        return self.top_k

    def resumed(self, step: int, before: int) -> str | None:
        """Warn where k goes by run.steps, which were `before`, and is another one now."""
        now = self.total_steps
        looked_at = {step + number * (now - step) // _LOOKED_AT for number in range(_LOOKED_AT + 1)}
        for each in sorted(looked_at):
            was, becomes = self.experts_at(each, before), self.experts_at(each)
            if was != becomes:
                return (f"run.steps was {before} and is {now}, and router=fixed_random grows by it: a token "
                        f"of step {each} has {becomes} experts, where it had {was}; "
                        f"router.growth_steps={before} keeps what the run began with")
        return None

    def logits(self, x_TD: Tensor) -> Tensor:
        return super().logits(x_TD) + self.bias

    def scores(self, x_TD: Tensor, context: RouterContext) -> Scores:
        """Score experts by their probability."""
        logits_TE = self.logits(x_TD)
        probs_TE = logits_TE.softmax(-1)
        return Scores(probs_TE, probs_TE, logits_TE)

    def choose(self, order_TC: Tensor | None, context: RouterContext) -> Tensor:
        """Choose the k largest scores."""
        ids_TK = super().choose(order_TC, context)
        place_K = torch.arange(self.top_k, device=ids_TK.device)
        return ids_TK.where(place_K < self.experts_at(context.step), -1)

    def weigh(self, scores: Scores, ids_TK: Tensor, context: RouterContext) -> Tensor:
        """Compute the softmax of the chosen logits."""
        weights_TK = super().weigh(scores, ids_TK, context)
        return self.scale * weights_TK / weights_TK.sum(-1, keepdim=True).clamp(min=1e-30)

    def route(self, x_TD: Tensor, context: RouterContext) -> Routing:
        """Choose experts for the tokens [T, D]; no more rows than the step has slots."""
        routing = super().route(x_TD, context)
        edited = edits_of(context) != RoutingEdits()         # which may use more slots
        return routing if edited else routing._replace(max_rows=len(x_TD) * self.experts_at(context.step))
