"""Load loss of noisy routers: experts get equal expected numbers of tokens.

    L = CV^2(load),   load_i = sum over tokens of Phi((z_i - threshold_i) / deviation_i)

z are the logits without noise, Phi is the distribution function of the normal distribution: the term is the
probability that a token would choose expert i again if only the noise of i were drawn anew. The threshold is
a noisy logit of the token, with its gradient:

    excluding    the k-th largest of the others (Shazeer et al., 1701.06538, appendix A)
    kth          the k-th largest of all (V-MoE, 2106.05974)

Where the deviation is 0, and for a router without noise, as in evaluation, the term is its limit: 1 for a
chosen expert and 0 for another, without gradient. config/rules refuses to train on that.

A known fault of reimplementations: they compare noisy logits with thresholds of which they have taken the
softmax. The count of tokens, which has no gradient, then hides behind a smooth number that is wrong.

Shapes: T tokens, E experts, K slots.
"""

from typing import Literal

import torch
from torch import Tensor

from moetrain.losses.scoped import VariationLoss
from moetrain.ops.counts import count_ids
from moetrain.ops.gating import scatter_weights, top_k
from moetrain.ops.router_sums import Decided


class LoadLoss(VariationLoss):
    """Squared coefficient of variation of the smooth load of experts.

    Args:
        weight: coefficient in the objective; a loss of weight 0 is not computed.
        threshold: noisy logit that an expert has to exceed: excluding or kth.
        scope: what is summed over: global, node or micro.
        mode: how sums are pooled under accumulation (`PoolRule` in losses/base.py); unused with scope micro.
        reduction: mean or sum over routers.
    """

    measured = "load_E"
    summed = frozenset({"load_E", "tokens"})

    def __init__(self, *, weight: float = 5e-3, threshold: Literal["excluding", "kth"] = "excluding",
                 scope: Literal["global", "node", "micro"] = "global",
                 mode: Literal["exact", "sync", "buffer"] = "exact",
                 reduction: Literal["mean", "sum"] = "mean") -> None:
        self.token_sums = {"load_E": load_excluding if threshold == "excluding" else load_of_kth}
        super().__init__(weight=weight, scope=scope, mode=mode, reduction=reduction)


def load_excluding(decided: Decided) -> Tensor:
    """Sum the probabilities of choosing each expert again, [E], by the k-th largest of the others."""
    return _load(decided, excluding=True)


def load_of_kth(decided: Decided) -> Tensor:
    """Sum the probabilities of choosing each expert again, [E], by the k-th largest of all."""
    return _load(decided, excluding=False)


def _load(decided: Decided, *, excluding: bool) -> Tensor:
    experts, slots = decided.probs_TC.shape[1], decided.ids_TK.shape[1]
    if decided.noise is None:
        return count_ids(decided.ids_TK, experts).to(decided.probs_TC.dtype)
    noisy_TE, deviation_TE = decided.noise
    assert decided.logits_TC is not None
    if excluding and slots == experts:
        threshold_TE = torch.full_like(noisy_TE, float("-inf"))          # every expert is always chosen
    else:
        _, best_TK = top_k(noisy_TE, min(slots + 1, experts))
        kth_T1 = noisy_TE.gather(1, best_TK[:, slots - 1:slots])
        threshold_TE = kth_T1.expand_as(noisy_TE)
        if excluding:
            threshold_TE = threshold_TE.scatter(
                1, best_TK[:, :slots], noisy_TE.gather(1, best_TK[:, slots:]).expand(-1, slots))
    noisy_T1 = deviation_TE > 0                              # padding has none, either
    z_TE = (decided.logits_TC - threshold_TE) / deviation_TE.where(noisy_T1, 1)
    chosen_TE = scatter_weights((decided.ids_TK >= 0).to(z_TE.dtype), decided.ids_TK, experts)
    return torch.special.ndtr(z_TE).where(noisy_T1, chosen_TE).sum(0)
