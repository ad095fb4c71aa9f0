"""Softmax top-k routing (GShard, Switch, Mixtral, OLMoE, Qwen3-MoE, DeepSeek-V2).

    z = x W^T,  p = softmax(z),  the k largest p are chosen; the gate weights are `scale` times

    raw               p at the chosen ids           Switch (k = 1), OLMoE, DeepSeekMoE, DeepSeek-V2 (scale 16)
    renorm            the same over their sum       Mixtral, Qwen3, GShard top-2
    softmax_of_topk   softmax of the chosen logits  GPT-OSS: the same function as renorm

Padding chooses nothing. top_k = 1 with renormalized weights has no gradient of the cross-entropy;
config/rules refuses it. The choice may be limited to a few groups of experts (routers/groups.py). With
`balance=quantile` the k largest p + b are chosen, by a bias b that balances the loads (routers/quantile.py);
the gate weights are those of p.

Shapes: T tokens, D model width, E experts, K slots.
"""

from typing import Literal

from torch import Tensor

from moetrain.ops.router import RouterRule
from moetrain.routers.base import RouterContext, Scores
from moetrain.routers.quantile import BiasedRouter


class TopKRouter(BiasedRouter):
    """Router with softmax probabilities.

    Args:
        dim: D.
        num_experts: E.
        top_k: K, number of slots of a token.
        weights: convention of the gate weights: renorm, raw or softmax_of_topk.
        scale: factor of the gate weights.
        balance: what balances the choice: none, or quantile, a bias that follows quantiles of margins.
        quantile_rate: with balance=quantile, share of the way to the quantile that a step moves the bias.
        num_groups: number of groups of experts; 1 is no limit.
        topk_groups: number of groups that a token may use.
        group_score: score of a group: top2, the sum of its two best scores; max, its best.
    """

    BOUNDS = {"scale": "above 0"}
    CONSTANT_WEIGHTS = {"weights": ["renorm", "softmax_of_topk"]}

    def __init__(self, *, dim: int, num_experts: int, top_k: int,
                 weights: Literal["renorm", "raw", "softmax_of_topk"] = "renorm", scale: float = 1.0,
                 balance: Literal["none", "quantile"] = "none", quantile_rate: float = 1.0,
                 num_groups: int = 1, topk_groups: int = 1,
                 group_score: Literal["top2", "max"] = "max") -> None:
        assert balance in ("none", "quantile"), balance
        super().__init__(dim=dim, num_experts=num_experts, top_k=top_k, biased=balance == "quantile",
                         quantile_rate=quantile_rate if balance == "quantile" else None,
                         num_groups=num_groups, topk_groups=topk_groups, group_score=group_score)
        assert weights in ("renorm", "raw", "softmax_of_topk"), weights
        self.weights, self.scale = weights, scale

    def scores(self, x_TD: Tensor, context: RouterContext) -> Scores:
        """Score experts by their probability, for the choice with the bias if there is one."""
        logits_TE = self.logits(x_TD)
        probs_TE = logits_TE.softmax(-1)
        order_TE = probs_TE if self.bias is None else probs_TE.detach() + self.bias
        return Scores(order_TE, probs_TE, logits_TE)

    def weigh(self, scores: Scores, ids_TK: Tensor, context: RouterContext) -> Tensor:
        """Compute gate weights by the convention `weights`."""
        weights_TK = super().weigh(scores, ids_TK, context)
        if self.weights != "raw":
            # The weights of padding sum to 0: the floor keeps 0 / 0 out of forward and backward.
            total_T1 = weights_TK.sum(-1, keepdim=True).clamp(min=1e-30)
            weights_TK = weights_TK / total_T1
        return self.scale * weights_TK

    def probabilities(self, scores: Scores) -> Tensor | None:
        """Return the softmax as it is."""
        return scores.gates_TC

    @property
    def op_rule(self) -> RouterRule:
        """Rule of the same scores and weights for the fused op."""
        return self.rule(sigmoid=False, renormalised=self.weights != "raw", scale=self.scale)
