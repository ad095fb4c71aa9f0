"""Load balance with null experts (AdaMoE, Zeng et al. 2024, arXiv 2406.13233).

    loss = C sum_i f~_i P_i      f_i = n_i / sum n
                                 f~_i = f_i for experts; for the others, the mean of f over them

C choices, E of which are experts (routers/null_expert.py). Choices that compute nothing are interchangeable,
so only their mean load is charged: they may be loaded unevenly, and together take (C - E) / C of the slots at
perfect balance, where the loss is 1. The sum of probabilities of a micro-batch stands for its P, as in
losses/load_balance.py, whose value this is where all choices are experts. The paper's weight is 1e-3.

One of the authors' two experiments takes this mean over slots instead of over null experts, which changes
nothing; this follows the formula.

Shapes: C choices, R routers.
"""

from typing import Literal

import torch
from torch import Tensor

from moetrain.losses.base import Pooled
from moetrain.losses.load_balance import balance_slope
from moetrain.losses.pooled_slopes import PooledSlopeLoss, are_experts


class NullBalanceLoss(PooledSlopeLoss):
    """Load balance that charges choices which compute nothing by their mean load.

    Args:
        weight: coefficient in the objective; a loss of weight 0 is not computed.
        scope: what counts are taken over: global, node, micro (a micro-batch of a rank).
        mode: how counts are pooled under accumulation (`PoolRule`); unused with scope micro.
        reduction: mean or sum over routers.
    """

    def __init__(self, *, weight: float = 1e-3, scope: Literal["global", "node", "micro"] = "global",
                 mode: Literal["exact", "sync", "buffer", "warm"] = "exact",
                 reduction: Literal["mean", "sum"] = "mean") -> None:
        super().__init__(weight=weight, scope=scope, mode=mode, reduction=reduction)

    def slope(self, counts_RC: Tensor, tokens_R: Tensor, pooled: Pooled) -> Tensor:
        """Charge C f~."""
        experts_RC = are_experts(counts_RC, pooled)
        others_R1 = (~experts_RC).sum(-1, keepdim=True).clamp(min=1)
        mean_R1 = counts_RC.where(~experts_RC, 0).sum(-1, keepdim=True) / others_R1
        one = torch.ones((), device=counts_RC.device)
        return balance_slope(counts_RC.where(experts_RC, mean_R1), one, counts_RC.dtype)
