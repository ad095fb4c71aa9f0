"""Load-balancing loss over a scope ("Demons in the Detail", arXiv 2501.11873).

    LBL = E * sum_i f_i P_i        f_i = n_i / sum n  share of the slots,  P_i  mean probability;  perfect = 1

`f` is a constant for autograd; all gradient flows through P. What f is counted over is the scope:

    global      all ranks and accumulation steps of the optimizer step
    node        those of the ranks of one machine
    micro       one micro-batch on one rank
    sequence    one sequence

Whatever it is, a micro-batch contributes

    E * sum_i f_i * (sum_t p_ti) / N        N = valid tokens of the global batch

so that the sum over micro-batches and ranks is the loss, and the weight of a token never depends on split and padding. With
`sequence` the inner sum is one for each sequence.

Others normalise otherwise, and coefficients do not carry over without the factor: Switch, Megatron and OLMo-core are 1 when
perfect too; Hugging Face's counts slots per token, k for each, and is k when perfect.
"""

from typing import Literal

import torch
from torch import Tensor

from moetrain.losses.base import AuxLoss, Pooled, PoolRule
from moetrain.routers.base import RoutingStats


class LoadBalanceLoss(AuxLoss):
    """weight: coefficient; 0 only reports. scope: see above, or none, which only reports whatever the weight.
    mode: how f is pooled under accumulation (losses/base.py PoolRule); means nothing for micro and sequence. drift: with warm,
    how far shares may move from one step to the next (total variation) for the step before to say anything.
    normalisation: whose weight this is: one and megatron (perfect = 1), huggingface (perfect = k).
    reduction: mean or sum over routers."""

    BOUNDS = {"weight": "0 or more", "drift": "in [0, 1]"}

    def __init__(self, *, weight: float = 0.01,
                 scope: Literal["global", "node", "micro", "sequence", "none"] = "global",
                 mode: Literal["exact", "sync", "buffer", "warm"] = "exact", drift: float = 0.3,
                 normalisation: Literal["one", "megatron", "huggingface"] = "one",
                 reduction: Literal["mean", "sum"] = "mean") -> None:
        self.weight = 0.0 if scope == "none" else weight
        self.drift = drift
        self.scope, self.mode, self.normalisation, self.reduction = scope, mode, normalisation, reduction

    @property
    def pool(self) -> PoolRule | None:
        return PoolRule(self.scope, self.mode) if self.scope in ("global", "node") and self.weight > 0 else None

    @property
    def per_sequence(self) -> bool:
        return self.scope == "sequence" and self.weight > 0

    def value(self, stats: RoutingStats, pooled: Pooled) -> Tensor:
        ((field, slope),) = self.slopes(stats, pooled).items()
        return (slope * getattr(stats, field)).sum((-2, -1) if field == "prob_sum_SE" else -1)

    def slopes(self, stats: RoutingStats, pooled: Pooled) -> dict[str, Tensor]:
        dtype = stats.prob_sum_E.dtype
        if self.scope == "sequence":
            return {"prob_sum_SE": self._factor(stats, 2) * balance_slope(stats.counts_SE, pooled.tokens, dtype)}
        counts_E = stats.counts_E if self.scope == "micro" else pooled.counts_E
        return {"prob_sum_E": self._factor(stats, 1) * balance_slope(counts_E, pooled.tokens, dtype)}

    def _factor(self, stats: RoutingStats, behind: int) -> Tensor | float:
        """Of this normalisation over ours: slots per token. behind: dimensions that the sums have behind R."""
        if self.normalisation != "huggingface":
            return 1.0
        return (stats.active_sum / stats.tokens.clamp(min=1))[(..., *(None,) * behind)]


def balance_slope(counts_E: Tensor, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """E * f / N: the gradient of the loss with respect to each expert's probability sum. Finite when nothing is routed.
    counts [..., E]: one f for each row."""
    total = counts_E.sum(-1, keepdim=True)
    total = total.where(total > 0, 1).to(dtype)
    return counts_E.to(dtype) * (counts_E.shape[-1] / total / tokens.clamp(min=1).to(dtype))
