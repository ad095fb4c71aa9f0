"""The sums over tokens that losses and metrics need of a router, in one place.

    counts_E     int64   chosen slots per expert, before any drop
    prob_sum_E           sum of the router's probabilities      (gradient)
    lse2_sum             sum of logsumexp(logits)^2             (gradient; ST-MoE's z-loss)
    entropy_sum          sum of the entropy of the probabilities (gradient)

Padding counts nowhere. Every value is a sum over valid tokens, so shards, micro-batches and ranks add up.

Shapes: T tokens, E experts, K slots.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moetrain.ops.gating import count_choices


class RouterSums(NamedTuple):
    tokens: Tensor           # int64 scalar
    counts_E: Tensor
    prob_sum_E: Tensor
    lse2_sum: Tensor
    entropy_sum: Tensor
    active_sum: Tensor       # int64 scalar: used slots


def router_sums(probs_TE: Tensor, logits_TE: Tensor, ids_TK: Tensor, valid_T: Tensor | None) -> RouterSums:
    """Sums over the valid tokens; ids are those decided, -1 in unused slots."""
    counts_E = count_choices(ids_TK, probs_TE.shape[1])
    lse2_T = logits_TE.logsumexp(-1).square()
    entropy_T = torch.special.entr(probs_TE).sum(-1)
    if valid_T is None:
        tokens = counts_E.new_tensor(probs_TE.shape[0])
        prob_sum_E, lse2_sum, entropy_sum = probs_TE.sum(0), lse2_T.sum(), entropy_T.sum()
    else:
        # `where`, not a product: a padding token may hold anything, NaN included.
        zero = probs_TE.new_zeros(())
        tokens = valid_T.sum()
        prob_sum_E = probs_TE.where(valid_T[:, None], zero).sum(0)
        lse2_sum, entropy_sum = lse2_T.where(valid_T, zero).sum(), entropy_T.where(valid_T, zero).sum()
    return RouterSums(tokens, counts_E, prob_sum_E, lse2_sum, entropy_sum, counts_E.sum())
