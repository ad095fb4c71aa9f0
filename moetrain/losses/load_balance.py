"""Load-balancing loss over a scope ("Demons in the Detail", arXiv 2501.11873).

    LBL = E * sum_i f_i P_i        f_i = n_i / sum n  share of the slots,  P_i  mean probability;  perfect = 1

`f` is a constant for autograd; all gradient flows through P. With scope `global` f is pooled over all ranks and
accumulation steps of the optimizer step, with `micro` it is that of one micro-batch on one rank. Either way a
micro-batch contributes

    E * sum_i f_i * (sum_t p_ti) / N        N = valid tokens of the global batch

so that the sum over micro-batches and ranks is the loss, independent of split and padding. (Switch and Megatron state
the same normalisation; Hugging Face's is top_k times this.)
"""

from typing import Literal

import torch
from torch import Tensor

from moetrain.losses.base import Pooled
from moetrain.routers.base import RoutingStats


class LoadBalanceLoss:
    """weight: coefficient; 0 only reports. scope: global, micro, or none, which only reports whatever the weight.
    mode: exact, how a global f is obtained under accumulation. reduction: mean or sum over routers."""

    def __init__(self, *, weight: float = 0.01, scope: Literal["global", "micro", "none"] = "global",
                 mode: Literal["exact"] = "exact", reduction: Literal["mean", "sum"] = "mean") -> None:
        assert scope in ("global", "micro", "none") and mode == "exact" and reduction in ("mean", "sum"), (scope, mode, reduction)
        self.weight = 0.0 if scope == "none" else weight
        self.scope, self.mode, self.reduction = scope, mode, reduction

    @property
    def needs_pool(self) -> bool:
        return self.scope == "global" and self.weight > 0

    def value(self, stats: RoutingStats, pooled: Pooled) -> Tensor:
        return (self.slopes(stats, pooled)["prob_sum_E"] * stats.prob_sum_E).sum()

    def slopes(self, stats: RoutingStats, pooled: Pooled) -> dict[str, Tensor]:
        counts_E = pooled.counts_E if self.scope == "global" else stats.counts_E
        return {"prob_sum_E": balance_slope(counts_E, pooled.tokens, stats.prob_sum_E.dtype)}


def balance_slope(counts_E: Tensor, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """E * f / N: the gradient of the loss with respect to each expert's probability sum. Finite when nothing is routed."""
    total = counts_E.sum().clamp(min=1).to(dtype)
    return counts_E.to(dtype) * (counts_E.numel() / total / tokens.clamp(min=1).to(dtype))
