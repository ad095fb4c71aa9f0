"""Penalty on the gates of ReLU routing, heavier for experts with more load (ReMoE, arXiv 2412.14711).

    loss = lambda sum_i f_i mean_t g_ti      f_i = E n_i / (k N): 1 for an expert with its share of the slots

The routers keep lambda and move it (routers/relu.py). They bring the sum lambda / k * g over tokens, so that
the loss follows what is in their checkpoint. The factor f makes it a balance loss, too. It is 0 where no
token takes an expert.

Counts are those of the whole step, by default. The released code takes those of a micro-batch
(`scope=micro`), which depends on ranks and accumulation, and sums over layers (`reduction=sum`), while the
paper takes the mean: with the controller the two find the same sparsity by another lambda.

Shapes: E experts, R routers.
"""

from typing import Literal

from torch import Tensor

from moetrain.losses.base import Pooled
from moetrain.losses.pooled_slopes import PooledSlopeLoss


class L1BalanceLoss(PooledSlopeLoss):
    """Penalty on the gates, weighed by the load of their expert.

    Args:
        weight: factor beside lambda, which the routers control; a loss of weight 0 is not computed.
        scope: what counts are taken over: global, node, micro (a micro-batch of a rank).
        mode: how counts are pooled under accumulation (`PoolRule`); unused with scope micro.
        reduction: mean or sum over routers.
    """

    of = "l1_sum_E"
    counts_tokens = True
    NEEDS_SUMS = ["l1_sum_E"]

    def __init__(self, *, weight: float = 1.0, scope: Literal["global", "node", "micro"] = "global",
                 mode: Literal["exact", "sync", "buffer", "warm"] = "exact",
                 reduction: Literal["mean", "sum"] = "mean") -> None:
        super().__init__(weight=weight, scope=scope, mode=mode, reduction=reduction)

    def slope(self, counts_RC: Tensor, tokens_R: Tensor, pooled: Pooled) -> Tensor:
        """Charge k f: the routers have divided by k."""
        return counts_RC.shape[-1] * counts_RC / tokens_R[..., None]
