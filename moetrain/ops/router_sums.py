"""Statistics of a router: the sums over tokens from which losses and metrics are computed.

    tokens       int64   valid tokens
    counts_E     int64   chosen slots per expert, before any drop
    active_sum   int64   used slots
    dropped      int64   used slots that a capacity policy dropped (moe/capacity.py); a router drops none
    prob_sum_E           sum of the router's probabilities           (gradient)
    lse2_sum             sum of logsumexp(logits)^2                  (gradient; ST-MoE's z-loss)
    entropy_sum          sum of the entropy of the probabilities     (gradient)
    counts_SE, prob_sum_SE   the same of each sequence, if a loss asks for them

Padding counts nowhere. Every value is a sum over valid tokens, so those of shards, micro-batches and ranks
add up.

Shapes: T tokens, E experts, K slots, S sequences.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moetrain.ops.counts import count_ids


class RouterSums(NamedTuple):
    """Sums over valid tokens. The fields are described at the top of the file."""

    tokens: Tensor           # int64 scalar
    counts_E: Tensor
    prob_sum_E: Tensor
    lse2_sum: Tensor
    entropy_sum: Tensor
    active_sum: Tensor       # int64 scalar
    dropped: Tensor          # int64 scalar
    counts_SE: Tensor | None = None
    prob_sum_SE: Tensor | None = None


def router_sums(probs_TE: Tensor, logits_TE: Tensor | None, ids_TK: Tensor, valid_T: Tensor | None,
                offsets: Tensor | None = None) -> RouterSums:
    """Sum over the valid tokens.

    Args:
        probs_TE: probabilities [T, E] of the router, float32 or better.
        logits_TE: logits [T, E]; None: the sum of their squared logsumexp is 0.
        ids_TK: int64 [T, K], decided experts; -1 is unused, as are all slots of padding.
        valid_T: bool [T], false for padding; None: every token is valid.
        offsets: int64 [S + 1], first token of each sequence, and the end; None: no sums for each sequence.

    Returns:
        The sums, in the dtype of the probabilities, and int64 counts.
    """
    counts_E = count_ids(ids_TK, probs_TE.shape[1])
    tokens = counts_E.new_full((), len(probs_TE)) if valid_T is None else valid_T.sum()
    if valid_T is not None:
        # First, and by `where`: padding may hold anything, and 0 times NaN is NaN.
        probs_TE = probs_TE.where(valid_T[:, None], 0)
    lse2_sum = probs_TE.new_zeros(()) if logits_TE is None else _lse2_sum(logits_TE, valid_T)
    entropy_sum = torch.special.entr(probs_TE).sum()
    sums = RouterSums(tokens, counts_E, probs_TE.sum(0), lse2_sum, entropy_sum, counts_E.sum(),
                      counts_E.new_zeros(()))
    return sums if offsets is None else sums._replace(
        counts_SE=_counts_by_sequence(ids_TK, offsets, probs_TE.shape[1]),
        prob_sum_SE=torch.segment_reduce(probs_TE, "sum", offsets=offsets, axis=0))


def _lse2_sum(logits_TE: Tensor, valid_T: Tensor | None) -> Tensor:
    """Sum of logsumexp^2 over valid tokens."""
    if valid_T is None:
        return logits_TE.logsumexp(-1).square().sum()
    lse2_T = logits_TE.where(valid_T[:, None], 0).logsumexp(-1).square()
    return lse2_T.where(valid_T, 0).sum()                # a row of zeros has log(E)^2


def _counts_by_sequence(ids_TK: Tensor, offsets: Tensor, experts: int) -> Tensor:
    """Used slots of each expert in each sequence, int64 [S, E]."""
    sequences = len(offsets) - 1
    numbers_S = torch.arange(sequences, device=ids_TK.device)
    sequence_T = numbers_S.repeat_interleave(offsets.diff(), output_size=len(ids_TK))
    cells_TK = (sequence_T[:, None] * experts + ids_TK).where(ids_TK >= 0, -1)
    return count_ids(cells_TK, sequences * experts).view(sequences, experts)
