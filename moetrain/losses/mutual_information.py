"""Mutual-information loss (ModuleFormer, arXiv 2306.04640): sure about each token, balanced over all.

    L = mean_t H(p_t) - H(P),  P = mean_t p_t         minus the information that a token has on its expert

It is 0 where all tokens have the same probabilities, whatever these are, and -log E at its least: every token
sure, every expert with an equal share. It has no use for counts.

The entropy of the mean is not linear. A micro-batch contributes

    (sum_t H(p_t) + sum_t sum_i p_ti log P_i) / N        N: valid tokens of the global batch

with P of the scope, a constant: the sum over micro-batches is L of the scope, and its derivative that of L,
since the derivative of log P cancels (sum_i P_i = 1). With scope global and mode exact, L is that of the
whole batch, however it is split. The release takes P over the tokens of a device (scope=micro), and adds 1e-8
to it in the logarithm; here P below 1e-30 counts as that.

Shapes: E experts, R routers.
"""

from typing import Literal

from torch import Tensor

from moetrain.losses.base import Pooled
from moetrain.losses.scoped import ScopedLoss
from moetrain.routers.base import RoutingStats


class MutualInformationLoss(ScopedLoss):
    """Mean entropy of the probabilities, less the entropy of their mean.

    Args:
        weight: coefficient in the objective; a loss of weight 0 is not computed.
        scope: tokens over which the mean is taken: global, node or micro.
        mode: how sums are pooled under accumulation (`PoolRule` in losses/base.py); unused with scope micro.
        reduction: mean or sum over routers.
    """

    summed = frozenset({"prob_sum_E", "tokens"})

    def __init__(self, *, weight: float = 1e-2, scope: Literal["global", "node", "micro"] = "global",
                 mode: Literal["exact", "sync", "buffer"] = "exact",
                 reduction: Literal["mean", "sum"] = "mean") -> None:
        super().__init__(weight=weight, scope=scope, mode=mode, reduction=reduction)

    def value(self, stats: RoutingStats, pooled: Pooled) -> Tensor:
        """Contribution of a micro-batch to the loss of each router, [R], with gradient."""
        slopes = self.slopes(stats, pooled)
        return slopes["entropy_sum"] * stats.entropy_sum + (slopes["prob_sum_E"] * stats.prob_sum_E).sum(-1)

    def slopes(self, stats: RoutingStats, pooled: Pooled) -> dict[str, Tensor]:
        """Gradient of `value` at the sums of entropies, one number, and of probabilities, [R, E]."""
        prob_sum_RE, tokens_R = (self.over_scope(stats, pooled, name) for name in ("prob_sum_E", "tokens"))
        dtype, whole = stats.prob_sum_E.dtype, pooled.tokens.clamp(min=1).double()
        mean_RE = prob_sum_RE / tokens_R.clamp(min=1)[..., None]
        return {"entropy_sum": (1 / whole).to(dtype),
                "prob_sum_E": (mean_RE.clamp(min=1e-30).log() / whole).to(dtype)}
