"""Load balance between experts and choices that compute nothing (MoE++, Jin et al. 2024, arXiv 2410.07348).

    loss = sum_i eta_i f_i P_i      f_i = n_i / N, slots of a token;  eta_i = 1 for experts, else tau

tau below 1 charges less for choices that compute nothing, so that tokens use them more; 1 treats all alike.
The sum over choices has no factor C, unlike that of losses/load_balance.py: at perfect balance, and tau = 1,
it is k / C for k choices a token. A coefficient of the balance loss with `normalization=one` corresponds to
C / k times as much here.

Shapes: C choices, R routers.
"""

from typing import Literal

from torch import Tensor

from moetrain.losses.base import Pooled
from moetrain.losses.pooled_slopes import PooledSlopeLoss, are_experts


class HeterogeneousBalanceLoss(PooledSlopeLoss):
    """Load balance that charges less for choices which compute nothing.

    Args:
        weight: coefficient in the objective; a loss of weight 0 is not computed.
        tau: what a choice that computes nothing is charged, as a share of an expert.
        scope: what counts are taken over: global, node, micro (a micro-batch of a rank).
        mode: how counts are pooled under accumulation (`PoolRule`); unused with scope micro.
        reduction: mean or sum over routers.
    """

    counts_tokens = True
    BOUNDS = {"weight": "0 or more", "tau": "in [0, 1]"}

    def __init__(self, *, weight: float = 1e-2, tau: float = 0.75,
                 scope: Literal["global", "node", "micro"] = "global",
                 mode: Literal["exact", "sync", "buffer", "warm"] = "exact",
                 reduction: Literal["mean", "sum"] = "mean") -> None:
        super().__init__(weight=weight, scope=scope, mode=mode, reduction=reduction)
        self.tau = tau

    def slope(self, counts_RC: Tensor, tokens_R: Tensor, pooled: Pooled) -> Tensor:
        """Charge eta f."""
        charged_RC = counts_RC.where(are_experts(counts_RC, pooled), self.tau * counts_RC)
        return charged_RC / tokens_R[..., None]
