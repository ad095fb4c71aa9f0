"""Sigmoid routing with a selection bias (DeepSeek-V3, GLM-4.5), which balances without a loss.

    z = x W^T,  s = sigmoid(z);  the k largest of s + b are chosen; the gate weights are `scale` times

    renorm            s at the chosen ids over (their sum + 1e-20)
    raw               s at the chosen ids

The bias b [E] affects the choice alone, and has no gradient. After every optimizer step it moves against the
load of the whole step:

    b_i <- b_i + u sign(mean(n) - n_i)        n_i: slots of expert i, all ranks, all micro-batches

DeepSeek-V3 trains with u = 1e-3, and 0 in the last part. The sign is computed from integers, so b has the
same bits on every rank and every mesh. With `counts=micro`, b moves by the mean of the steps that the
micro-batches of all ranks would have made, each by its own counts, as in the baseline of "Demons in the
Detail" (2501.11873). That depends on ranks and accumulation. Losses use P = s / sum_j s_j as the
probabilities.

In exact arithmetic, a constant added to all biases changes no choice, inside groups or without them. Where
few experts are overloaded, most biases rise together, by up to u in a step, and float32 rounds s + b to 2^-24
of its size. At a mean of 150, scores that differ by less than 8e-6 become equal, and with 256 experts 0.05 to
0.08 % of the tokens choose other experts. So the mean is subtracted after every update (`center`), and b
stays as small as its differences.

With `balance=quantile` quantiles of margins move the bias instead, to where every expert takes its share
(routers/quantile.py).

Padding chooses nothing and counts nowhere. The choice may be limited to a few groups of experts
(routers/groups.py).

Shapes: T tokens, D model width, E experts, K slots.
"""

from typing import Literal

import torch
from torch import Tensor

from moetrain.ops.counts import load_error_sign
from moetrain.ops.router import RouterRule
from moetrain.routers.base import RouterContext, Scores
from moetrain.routers.quantile import BiasedRouter

TINY = 1e-20                                 # DeepSeek-V3's; also avoids 0 / 0 in rows of padding


class SigmoidRouter(BiasedRouter):
    """Router with sigmoid scores and a selection bias that follows the loads.

    Args:
        dim: D.
        num_experts: E.
        top_k: K, number of slots of a token.
        weights: convention of the gate weights: renorm or raw.
        scale: factor of the gate weights.
        balance: what moves the biases: sign, of the load error, or quantile, of the margins.
        quantile_rate: with balance=quantile, share of the way to the quantile that a step moves the biases.
        update_rate: u, with balance=sign, step of a bias in an update; with 0 the biases stay as they are.
        counts: with balance=sign, counts whose sign moves the biases: those of the whole step (global) or of
            each micro-batch (micro).
        center: subtract the mean of the biases after each update; without it, the biases are those of
            DeepSeek-V3's report to the bit.
        num_groups: number of groups of experts; 1 is no limit.
        topk_groups: number of groups that a token may use.
        group_score: score of a group: top2, the sum of its two best scores; max, its best.
    """

    BOUNDS = {"scale": "above 0", "update_rate": "0 or more"}
    CONSTANT_WEIGHTS = {"weights": ["renorm"]}

    def __init__(self, *, dim: int, num_experts: int, top_k: int,
                 weights: Literal["renorm", "raw"] = "renorm", scale: float = 1.0,
                 balance: Literal["sign", "quantile"] = "sign", quantile_rate: float = 1.0,
                 update_rate: float = 1e-3, counts: Literal["global", "micro"] = "global",
                 center: bool = True, num_groups: int = 1, topk_groups: int = 1,
                 group_score: Literal["top2", "max"] = "top2") -> None:
        assert balance in ("sign", "quantile"), balance
        super().__init__(dim=dim, num_experts=num_experts, top_k=top_k, biased=True,
                         quantile_rate=quantile_rate if balance == "quantile" else None, center=center,
                         num_groups=num_groups, topk_groups=topk_groups, group_score=group_score)
        assert weights in ("renorm", "raw") and counts in ("global", "micro"), (weights, counts)
        self.weights, self.scale = weights, scale
        self.update_rate, self.counts = (update_rate if balance == "sign" else 0.0), counts

    def scores(self, x_TD: Tensor, context: RouterContext) -> Scores:
        """Order experts by s + b; the gates are s."""
        logits_TE = self.logits(x_TD)
        gates_TE = logits_TE.sigmoid()
        return Scores(gates_TE.detach() + self.bias, gates_TE, logits_TE)

    def weigh(self, scores: Scores, ids_TK: Tensor, context: RouterContext) -> Tensor:
        """Compute gate weights by the convention `weights`."""
        weights_TK = super().weigh(scores, ids_TK, context)
        if self.weights == "renorm":
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + TINY)
        return self.scale * weights_TK

    def probabilities(self, scores: Scores) -> Tensor | None:
        """Divide the gates by their sum."""
        assert scores.gates_TC is not None
        return scores.gates_TC / (scores.gates_TC.sum(-1, keepdim=True) + TINY)

    @property
    def op_rule(self) -> RouterRule:
        """Rule of the same scores and weights for the fused op."""
        return self.rule(sigmoid=True, renormalised=self.weights == "renorm", scale=self.scale)

    @property
    def needs_load_error(self) -> bool:
        """Whether `end_of_step` wants `signs_E`: with counts=micro."""
        return self.counts == "micro" and self.update_rate != 0

    @torch.no_grad()
    def end_of_step(self, counts_E: Tensor, tokens: int, signs_E: Tensor | None = None) -> None:
        """Move the biases against the loads of the step (`Router.end_of_step`)."""
        if self.update_rate == 0:
            return
        error_E = signs_E if self.needs_load_error else load_error_sign(counts_E)
        assert error_E is not None
        self.move(self.update_rate * error_E.to(self.bias.dtype))
