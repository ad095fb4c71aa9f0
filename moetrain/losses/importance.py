"""Importance loss: experts get equal sums of gate weights, or of probabilities.

    L = CV^2(I)        I_i: sum over tokens of the gate weight (gates) or the probability (probabilities) of i

gates is the form of Shazeer et al. (1701.06538), for which an expert that is not chosen adds 0;
probabilities that of V-MoE (2106.05974), of the softmax without noise. V-MoE trains on the mean of this
loss and the load loss (losses/load.py), with 0.005 for each. The releases take it over the tokens of a device
or a group; here the scope is the global batch unless `scope` says otherwise (losses/scoped.py).

It is 0 for equal sums, and E - 1 if one expert has all.

Shapes: E experts.
"""

from typing import Literal

from moetrain.losses.scoped import VariationLoss
from moetrain.ops.router_sums import importance


class ImportanceLoss(VariationLoss):
    """Squared coefficient of variation of the importance of experts.

    Args:
        weight: coefficient in the objective; a loss of weight 0 is not computed.
        of: what is summed: gates, the weights of the chosen experts, or probabilities, of all experts.
        scope: what is summed over: global, node or micro.
        mode: how sums are pooled under accumulation (`PoolRule` in losses/base.py); unused with scope micro.
        reduction: mean or sum over routers.
    """

    def __init__(self, *, weight: float = 5e-3, of: Literal["gates", "probabilities"] = "gates",
                 scope: Literal["global", "node", "micro"] = "global",
                 mode: Literal["exact", "sync", "buffer"] = "exact",
                 reduction: Literal["mean", "sum"] = "mean") -> None:
        self.measured = "importance_E" if of == "gates" else "prob_sum_E"
        self.token_sums = {"importance_E": importance} if of == "gates" else {}
        self.summed = frozenset({self.measured, "tokens"})
        super().__init__(weight=weight, scope=scope, mode=mode, reduction=reduction)
