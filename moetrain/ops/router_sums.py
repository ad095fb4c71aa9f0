"""The sums over tokens that losses and metrics need of a router, in one place.

    counts_E     int64   chosen slots per expert, before any drop
    dropped      int64   how many of them a capacity policy dropped (moe/capacity.py); a router drops none
    prob_sum_E           sum of the router's probabilities      (gradient)
    lse2_sum             sum of logsumexp(logits)^2             (gradient; ST-MoE's z-loss)
    entropy_sum          sum of the entropy of the probabilities (gradient)
    counts_SE, prob_sum_SE    the same for every sequence, where a loss asks for it (gradient)

Padding counts nowhere. Every value is a sum over valid tokens, so shards, micro-batches and ranks add up.

Shapes: T tokens, E experts, K slots, S sequences.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moetrain.ops.counts import count_ids


class RouterSums(NamedTuple):
    tokens: Tensor           # int64 scalar
    counts_E: Tensor
    prob_sum_E: Tensor
    lse2_sum: Tensor
    entropy_sum: Tensor
    active_sum: Tensor       # int64 scalar: used slots
    dropped: Tensor          # int64 scalar
    counts_SE: Tensor | None = None
    prob_sum_SE: Tensor | None = None


def router_sums(probs_TE: Tensor, logits_TE: Tensor, ids_TK: Tensor, valid_T: Tensor | None,
                offsets: Tensor | None = None) -> RouterSums:
    """Sums over the valid tokens; ids are those decided, -1 in unused slots. offsets: int64 [S + 1], first token of every
    sequence and the end, where sums for each are wanted."""
    counts_E = count_ids(ids_TK, probs_TE.shape[1])
    tokens = counts_E.new_full((), len(probs_TE)) if valid_T is None else valid_T.sum()
    if valid_T is not None:
        # Before anything is computed, and by `where`: a padding token may hold anything, and 0 times NaN is NaN.
        probs_TE = probs_TE.where(valid_T[:, None], 0)
        logits_TE = logits_TE.where(valid_T[:, None], 0)
    lse2_T = logits_TE.logsumexp(-1).square()
    if valid_T is not None:
        lse2_T = lse2_T.where(valid_T, 0)                # of a row of zeros it is log(E)^2
    entropy_sum = torch.special.entr(probs_TE).sum()
    sums = RouterSums(tokens, counts_E, probs_TE.sum(0), lse2_T.sum(), entropy_sum, counts_E.sum(), counts_E.new_zeros(()))
    return sums if offsets is None else sums._replace(
        counts_SE=_counts_by_sequence(ids_TK, offsets, probs_TE.shape[1]),
        prob_sum_SE=torch.segment_reduce(probs_TE, "sum", offsets=offsets, axis=0))


def _counts_by_sequence(ids_TK: Tensor, offsets: Tensor, experts: int) -> Tensor:
    sequences = len(offsets) - 1
    of_token_T = torch.arange(sequences, device=ids_TK.device).repeat_interleave(offsets.diff(), output_size=len(ids_TK))
    cells_TK = (of_token_T[:, None] * experts + ids_TK).where(ids_TK >= 0, -1)
    return count_ids(cells_TK, sequences * experts).view(sequences, experts)
