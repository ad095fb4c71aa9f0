"""Top-p routing (Huang et al. 2024, "Harder Tasks Need More Experts", arXiv 2403.07652).

    p = softmax(x W^T), in descending order p_(1) >= p_(2) >= ...
    a token takes the fewest experts whose probabilities sum to `p` or more; the gate weights are p

In exclusive form: the expert of rank j is taken iff sum_{i<j} p_(i) < `p`. So a token that is sure takes one
expert, and one that is not takes many. The paper's setting is p = 0.4, with an MoE layer in every second
block, gate weights that are not renormalized, a balance loss of weight 1e-2 and an entropy loss of weight
1e-4 (`loss=[entropy]`). Without the entropy loss the router flattens and takes more and more experts.

Differences from the released code (ZhenweiAn/Dynamic_MoE): it asks whether the sum is larger than p, which
differs only where a partial sum equals p; and with p = 1 it trusts a float32 sum, which reaches 1 before the
last expert. Here 1 takes all experts.

At the start probabilities are nearly equal, and a token takes about p * E experts: memory is highest in the
first steps, and the dispatcher counts the slots that are used. `k_max` bounds them.

Shapes: T tokens, D model width, E experts, K slots.
"""

import math

import torch
from torch import Tensor

from moetrain.ops.gating import top_k
from moetrain.routers.base import LinearRouter, RouterContext, Scores


class TopPRouter(LinearRouter):
    """Router with as many experts for a token as its probabilities need to reach a sum.

    Args:
        dim: D.
        num_experts: E.
        p: sum of probabilities that a token's experts have to reach; 1 is all experts.
        k_min: experts that a token takes at least.
        k_max: experts that a token takes at most; null: all of them.
    """

    BOUNDS = {"p": "in (0, 1]", "k_min": "1 or more", "k_max": "1 or more"}
    MEAN_EXPERTS = "min(k_max or E, max(k_min, p * E))"      # at equal probabilities, before training
    SLOTS = "k_max or E"
    uses_few_slots = True

    def __init__(self, *, dim: int, num_experts: int, p: float = 0.4, k_min: int = 1,
                 k_max: int | None = None) -> None:
        super().__init__(dim=dim, num_experts=num_experts, top_k=num_experts if k_max is None else k_max)
        assert 1 <= k_min <= self.top_k <= num_experts, (k_min, k_max, num_experts)
        self.p, self.k_min = p, k_min

    @property
    def threshold(self) -> float | Tensor:
        """Sum of probabilities before which a token takes a further expert; infinity takes all of them."""
        return self.p if self.p < 1 else math.inf

    def scores(self, x_TD: Tensor, context: RouterContext) -> Scores:
        """Score experts by their probability."""
        logits_TE = self.logits(x_TD)
        probs_TE = logits_TE.softmax(-1)
        return Scores(probs_TE, probs_TE, logits_TE)

    def choose(self, order_TC: Tensor | None, context: RouterContext) -> Tensor:
        """Choose experts in descending order until the sum of those before reaches the threshold."""
        assert order_TC is not None
        sorted_TK, ids_TK = top_k(order_TC, self.top_k)
        # An edit may have made scores infinite: forbidden and forced experts count for nothing in the sum.
        sums_TK = sorted_TK.where(sorted_TK.isfinite(), 0).cumsum(-1)
        before_TK = torch.cat([torch.zeros_like(sums_TK[:, :1]), sums_TK[:, :-1]], 1)
        kept_TK = before_TK < self.threshold
        kept_TK[:, :self.k_min] = True
        return ids_TK.where(kept_TK & (sorted_TK != -math.inf), -1)

    def probabilities(self, scores: Scores) -> Tensor | None:
        """Return the softmax as it is."""
        return scores.gates_TC
