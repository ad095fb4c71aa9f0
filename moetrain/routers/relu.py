"""Routing by ReLU: differentiable, with a number of experts that a penalty controls (ReMoE).

    g = relu(x W^T);  a token takes every expert with g > 0, and g are the gate weights

There is no softmax and no choice of k, so the output of a layer is continuous where an expert comes or goes.
A penalty on g, `loss=[l1_lb]`, makes gates 0. Its coefficient is the same for all layers, and is moved after
every step, until tokens take k experts in the mean:

    lambda <- lambda * alpha^sign((1 - k/E) - S)      S: share of the gates that are 0, mean over layers

Wang et al. 2024, "ReMoE: Fully Differentiable Mixture-of-Experts with ReLU Routing", arXiv 2412.14711, with
lambda_0 = 1e-8 and alpha = 1.2 in all of its runs, and no other balance loss (`balance=none`). lambda stays
between 1e-30 and 1e30.

S is that of the whole step, over ranks and accumulation, so lambda has the same bits on every mesh; the
released code takes the mean over micro-batches, which is the same where these are equally large. Losses of
probabilities use g over its sum; the paper has none of these.

In the first steps about half of all slots are used, until the penalty has grown: memory is highest then, and
the dispatcher counts the slots that are used. A token may use no expert at all.

Shapes: T tokens, D model width, E experts, C choices (experts alone, here), K = E slots.
"""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from moetrain.ops.router_sums import Decided, importance
from moetrain.ops.start import Start, constant
from moetrain.routers.base import LinearRouter, RouterContext, Scores

# Of the coefficient: float32 could not leave 0 and infinity again.
_RANGE = 1e-30, 1e30


class ReluRouter(LinearRouter):
    """Router whose tokens take every expert with a positive logit.

    Args:
        dim: D.
        num_experts: E.
        top_k: experts of a token to aim at, unless `target_k` says otherwise.
        target_k: k, experts of a token to aim at, in the mean over tokens and layers; null is model.top_k.
        lambda0: coefficient of the penalty before the first step.
        alpha: factor by which the coefficient grows or shrinks after a step.
    """

    BOUNDS = {"target_k": "above 0", "lambda0": "above 0", "alpha": "1 or more"}
    START_ARGUMENTS = ("lambda0",)
    BRINGS_SUMS = ["l1_sum_E"]
    MEAN_EXPERTS = "target_k or K"
    SLOTS = "E"
    uses_few_slots = True
    BY_TOKENS = True

    def __init__(self, *, dim: int, num_experts: int, top_k: int, target_k: float | None = None,
                 lambda0: float = 1e-8, alpha: float = 1.2) -> None:
        super().__init__(dim=dim, num_experts=num_experts, top_k=num_experts)
        self.target_k = top_k if target_k is None else target_k
        assert 0 < self.target_k <= num_experts, (self.target_k, num_experts)
        self.lambda0, self.alpha = lambda0, alpha
        self.register_buffer("coefficient", torch.empty(1))
        self.token_sums = {"l1_sum_E": self.penalty}

    def starts(self) -> dict[str, Start]:
        return {**super().starts(), "coefficient": constant(self.lambda0)}

    def penalty(self, decided: Decided) -> Tensor:
        """Sum the penalty of each expert, [C]: lambda / k times its gate weights."""
        return importance(decided) * (self.coefficient / self.target_k)

    def scores(self, x_TD: Tensor, context: RouterContext) -> Scores:
        """Score experts by relu of their logit."""
        return self.scores_of(self.logits(x_TD))

    def scores_of(self, logits_TE: Tensor) -> Scores:
        """Score experts by their logits [T, E]."""
        gates_TE = logits_TE.relu()
        # An expert whose gate is 0 is chosen only if an edit forces it.
        return Scores(gates_TE.where(gates_TE > 0, -torch.inf), gates_TE, logits_TE)

    def probabilities(self, scores: Scores) -> Tensor | None:
        """Divide the gates by their sum; 0 for a token without an expert."""
        gates_TE = scores.gates_TC
        assert gates_TE is not None
        total_T1 = gates_TE.sum(-1, keepdim=True)
        return gates_TE / total_T1.where(total_T1 > 0, 1)

    @classmethod
    @torch.no_grad()
    def end_of_step_together(cls, routers: Sequence[Self], counts: Sequence[Tensor], tokens: int) -> None:
        """Move the coefficient of all layers by the sign of their mean sparsity's error."""
        errors = [(counts_E.sum().double() - router.target_k * tokens) / router.num_experts
                  for router, counts_E in zip(routers, counts)]
        error = torch.stack(errors).mean()                   # tokens times ((1 - k/E) - S)
        for router in dict.fromkeys(routers):
            router.coefficient *= router.alpha ** error.sign().to(router.coefficient.dtype)
            router.coefficient.clamp_(*_RANGE)
