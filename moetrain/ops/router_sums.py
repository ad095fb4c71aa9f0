"""Statistics of a router: the sums over tokens from which losses and metrics are computed.

    tokens       int64   valid tokens
    counts_E     int64   chosen slots per expert, before any drop
    active_sum   int64   used slots
    dropped      int64   used slots that a capacity policy dropped (moe/capacity.py); a router drops none
    prob_sum_E           sum of the router's probabilities           (gradient)
    lse2_sum             sum of logsumexp(logits)^2                  (gradient; ST-MoE's z-loss)
    entropy_sum          sum of the entropy of the probabilities     (gradient)
    counts_SE, prob_sum_SE   the same of each sequence, if a loss asks for them
    extra                    further sums by name, which a loss or a router brings (`TokenSum`)
    values                   numbers of each token by name, [T], which a loss weighs by the prediction

Padding counts nowhere. Every value but `values` is a sum over valid tokens, so those of shards, micro-batches
and ranks add up.

Shapes: T tokens, E experts, K slots, S sequences.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from moetrain.ops.counts import count_ids
from moetrain.ops.gating import scatter_weights


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
    extra: Mapping[str, Tensor] | None = None
    values: Mapping[str, Tensor] | None = None

    def named(self) -> dict[str, Tensor]:
        """All sums by name, the further ones beside the fields."""
        fields = {name: value for name, value in self._asdict().items() if isinstance(value, Tensor)}
        return {**fields, **(self.extra or {}), **(self.values or {})}


class Noise(NamedTuple):
    """Normal noise on logits, by which a token chooses."""

    noisy_TC: Tensor         # logits + deviation * standard normal numbers, with gradient
    deviation_TC: Tensor     # with gradient, if the router learns it


class Decided(NamedTuple):
    """What further sums are formed of. Rows of padding are 0, their ids -1."""

    probs_TC: Tensor
    logits_TC: Tensor | None
    ids_TK: Tensor
    weights_TK: Tensor
    noise: Noise | None = None


# A sum over tokens, of a shape that does not depend on them; with gradient if it is of floating point.
TokenSum = Callable[[Decided], Tensor]


# One number for each token, [T], with gradient; 0 for padding.
TokenValue = Callable[[Decided], Tensor]


def first_choices(decided: Decided) -> Tensor:
    """Count the tokens that take each choice first, int64 [C] (GShard, X-MoE, DeepSpeed)."""
    return count_ids(decided.ids_TK[:, 0], decided.probs_TC.shape[1])


def importance(decided: Decided) -> Tensor:
    """Sum the gate weights of each choice, [C], with gradient (Shazeer et al. 2017)."""
    return scatter_weights(decided.weights_TK, decided.ids_TK, decided.probs_TC.shape[1]).sum(0)


def extra_sums(forms: Mapping[str, TokenSum], decided: Decided, valid_T: Tensor | None) -> dict[str, Tensor]:
    """Form further sums over the valid tokens, by name.

    Args:
        forms: how each sum is formed.
        decided: the decision, with rows of padding that may hold anything.
        valid_T: bool [T], false for padding; None: every token is valid.
    """
    taken = set(RouterSums._fields) & set(forms)
    assert not taken, f"sums of a loss or router are named like fields of RouterSums: {sorted(taken)}"
    if valid_T is not None:
        probs_TC, logits_TC, ids_TK, weights_TK, noise = decided
        kept_T1 = valid_T[:, None]
        decided = Decided(probs_TC.where(kept_T1, 0),
                          None if logits_TC is None else logits_TC.where(kept_T1, 0),
                          ids_TK, weights_TK.where(kept_T1, 0),
                          None if noise is None else Noise(*(part.where(kept_T1, 0) for part in noise)))
    return {name: form(decided) for name, form in forms.items()}


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
    # A probability of 0 has no entropy, and no gradient of it: that of entr is infinite there.
    entropy_sum = torch.special.entr(probs_TE.where(probs_TE != 0, 1)).sum()
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
