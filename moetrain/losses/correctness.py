"""Correctness loss: routers learn which experts predict rightly (DriftMoE, arXiv 2507.18464).

    L = mean_t mean over chosen i of BCE(sigmoid(z_ti), m_t)       z: logits of the router
      = mean_t mean over chosen i of  softplus(-z_ti) where m_t = 1,  softplus(z_ti) where m_t = 0

DriftMoE trains its router by binary cross-entropy towards a mask of all experts that have predicted the
label, so that every right expert gains, not the best alone. Its experts are classifiers: each predicts by
itself. Here an expert is a part of a layer, and the model predicts: m_t is 1 where its most probable token is
the target, and is the mask of the experts that the token chose. With one layer and one expert a token that is
DriftMoE's mask on the expert that ran; experts that did not run have no prediction, and so no term. Tokens
without a scored target have no term, and count as tokens of the batch.

A micro-batch contributes the sum over its tokens, divided by the valid tokens of the global batch, so the
loss does not depend on how the batch is split. The mask is a constant. It costs one more product with the
head, since cross-entropy may not have kept the logits. A router without logits has a loss of 0.

Shapes: T tokens, C choices, K slots, R routers.
"""

from typing import Literal

from torch import Tensor
from torch.nn.functional import softplus

from moetrain.losses.base import AuxLoss, Pooled
from moetrain.ops.router_sums import Decided
from moetrain.routers.base import RoutingStats


def cost_if_right(decided: Decided) -> Tensor:
    """Mean over the chosen experts of -log sigmoid(z), [T]; 0 for a token that chose none."""
    return _mean_over_chosen(decided, -1)


def cost_if_wrong(decided: Decided) -> Tensor:
    """Mean over the chosen experts of -log(1 - sigmoid(z)), [T]; 0 for a token that chose none."""
    return _mean_over_chosen(decided, 1)


def _mean_over_chosen(decided: Decided, sign: int) -> Tensor:
    if decided.logits_TC is None:
        return decided.probs_TC.new_zeros(len(decided.probs_TC))
    used_TK = decided.ids_TK >= 0
    costs_TK = softplus(sign * decided.logits_TC.gather(1, decided.ids_TK.clamp(min=0))).where(used_TK, 0)
    return costs_TK.sum(-1) / used_TK.sum(-1).clamp(min=1)


class CorrectnessLoss(AuxLoss):
    """Binary cross-entropy of the logits of chosen experts and of whether the model predicted the token.

    Args:
        weight: coefficient in the objective; a loss of weight 0 is not computed.
        reduction: mean or sum over routers.
    """

    BOUNDS = {"weight": "0 or more"}

    pool = None
    token_values = {"cost_if_right_T": cost_if_right, "cost_if_wrong_T": cost_if_wrong}

    def __init__(self, *, weight: float = 1e-2, reduction: Literal["mean", "sum"] = "mean") -> None:
        self.weight, self.reduction = weight, reduction

    def value(self, stats: RoutingStats, pooled: Pooled) -> Tensor:
        """Contribution of a micro-batch to the loss of each router, [R], with gradient."""
        assert stats.values is not None
        slopes = self.slopes(stats, pooled)
        right_R, wrong_R = ((slopes[name] * stats.values[name]).sum(-1) for name in self.token_values)
        return right_R + wrong_R

    def slopes(self, stats: RoutingStats, pooled: Pooled) -> dict[str, Tensor]:
        """Gradient of `value` at the costs of each token, [R, T]: 1 / N at the one that counts, else 0."""
        assert stats.values is not None and pooled.predicted_T is not None
        like_RT, tokens = stats.values["cost_if_right_T"], pooled.tokens.clamp(min=1)
        return {name: ((pooled.predicted_T == verdict).to(like_RT.dtype) / tokens).expand_as(like_RT)
                for name, verdict in (("cost_if_right_T", 1), ("cost_if_wrong_T", 0))}
