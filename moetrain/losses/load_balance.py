"""Load-balancing loss over a scope ("Demons in the Detail", arXiv 2501.11873).

    LBL = E * sum_i f_i P_i        f_i = n_i / sum n, share of the slots;  P_i, mean probability

It is 1 for perfect balance. f is a constant for autograd: all gradient flows through P. The scope is what f
is counted over:

    global      all ranks and accumulation steps of the optimizer step
    node        those of the ranks of one machine
    micro       one micro-batch on one rank
    sequence    one sequence

In every scope a micro-batch contributes

    E * sum_i f_i * (sum_t p_ti) / N        N = valid tokens of the global batch

so that the sum over micro-batches and ranks is the loss, and the weight of a token depends on neither split
nor padding. With `sequence` there is such a sum for each sequence.

Normalizations differ between frameworks, and coefficients carry over only with the factor. The losses of
Switch, Megatron and OLMo-core are 1 for perfect balance, too. Hugging Face's counts slots per token, k for
each, and is k.

Shapes: E experts, R routers, S sequences.
"""

from typing import Literal

import torch
from torch import Tensor

from moetrain.losses.base import AuxLoss, Pooled, PoolRule
from moetrain.routers.base import RoutingStats


class LoadBalanceLoss(AuxLoss):
    """Load-balancing loss with a choice of scope and normalization.

    Args:
        weight: coefficient in the objective; with 0 the loss is only reported.
        scope: what f is counted over; with none, the loss is only reported, whatever the weight.
        mode: how f is pooled under accumulation (`PoolRule` in losses/base.py); unused with scope micro and
            sequence.
        drift: with mode warm, how far shares may move from one step to the next (total variation) before the
            previous step's are not used.
        normalization: whose convention `weight` follows: one and megatron (perfect balance is 1), huggingface
            (k).
        reduction: mean or sum over routers.
    """

    BOUNDS = {"weight": "0 or more", "drift": "in [0, 1]"}

    def __init__(self, *, weight: float = 0.01,
                 scope: Literal["global", "node", "micro", "sequence", "none"] = "global",
                 mode: Literal["exact", "sync", "buffer", "warm"] = "exact", drift: float = 0.3,
                 normalization: Literal["one", "megatron", "huggingface"] = "one",
                 reduction: Literal["mean", "sum"] = "mean") -> None:
        self.weight = 0.0 if scope == "none" else weight
        self.drift = drift
        self.scope, self.mode, self.normalization, self.reduction = scope, mode, normalization, reduction

    @property
    def pool(self) -> PoolRule | None:
        """What counts are pooled over; None if the counts of the micro-batch suffice."""
        if self.scope in ("global", "node") and self.weight > 0:
            return PoolRule(self.scope, self.mode)
        return None

    @property
    def per_sequence(self) -> bool:
        """Whether routers must also sum over each sequence."""
        return self.scope == "sequence" and self.weight > 0

    def value(self, stats: RoutingStats, pooled: Pooled) -> Tensor:
        """Contribution of a micro-batch to the loss of each router, [R], with gradient."""
        ((field, slope),) = self.slopes(stats, pooled).items()
        return (slope * getattr(stats, field)).sum((-2, -1) if field == "prob_sum_SE" else -1)

    def slopes(self, stats: RoutingStats, pooled: Pooled) -> dict[str, Tensor]:
        """Gradient of `value` at the probability sums: [R, E], or [R, S, E] with scope sequence."""
        dtype = stats.prob_sum_E.dtype
        if self.scope == "sequence":
            slope_SE = balance_slope(stats.counts_SE, pooled.tokens, dtype)
            return {"prob_sum_SE": self._factor(stats, pooled, 2) * slope_SE}
        counts_E = stats.counts_E if self.scope == "micro" else pooled.counts_E
        return {"prob_sum_E": self._factor(stats, pooled, 1) * balance_slope(counts_E, pooled.tokens, dtype)}

    def _factor(self, stats: RoutingStats, pooled: Pooled, trailing: int) -> Tensor | float:
        """Factor of this normalization over ours, with as many trailing dims as the sums have behind R.

        It is the mean number of slots of a token, of the whole step where that is known (mode exact).
        """
        if self.normalization != "huggingface":
            return 1.0
        slots, tokens = stats.active_sum, stats.tokens
        if self.pool == PoolRule("global", "exact"):
            slots, tokens = pooled.counts_E.sum(-1), pooled.tokens
        return (slots / tokens.clamp(min=1))[(..., *(None,) * trailing)]


def balance_slope(counts_E: Tensor, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute E * f / N, the gradient of the loss at each expert's probability sum; 0 if nothing is routed.

    Args:
        counts_E: slots per expert [..., E]; one f for each row.
        tokens: N, valid tokens of the global batch.
        dtype: dtype of the result.

    Returns:
        Slopes [..., E].
    """
    total = counts_E.sum(-1, keepdim=True)
    total = total.where(total > 0, 1).to(dtype)
    return counts_E.to(dtype) * (counts_E.shape[-1] / total / tokens.clamp(min=1).to(dtype))
