"""Order of the training windows: a pure function of the index, so any sample (step, slot) can be computed.

Index g = (step - 1) * global_batch + slot counts samples from the start of the run. There is no state to
save, a batch costs the same for every size of text, and the number of ranks does not matter.

1. Several groups take turns by their shares, as evenly as whole numbers can (`whose_turn`). Inside a step the
   slots are then permuted, so that no slot, and with it no rank, always reads the same group.
2. Turn t of a group reads the targets t S … t S + S - 1 of its tokens repeated forever: an epoch is exactly
   its tokens. The turns inside an epoch are permuted by a key of (seed, fingerprint, group, epoch). A turn
   across the border of two epochs stays in place, so that no token comes again before all others have come.

A single group ends its epochs with a shorter window instead (`Windows` in windows.py): its size counts as the
next multiple of S, so no turn crosses a border.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from moetrain.data.batches.permutation import key_of, permuted, subkeys

ORDER = "windows-2"            # raise it when the same index gives a different window
_SIMPLE = 10_000               # shares that are ratios of numbers up to this are kept exactly
_FINEST = 1 << 30              # other shares are rounded to parts of this; its square fits an int64


class Order:
    """The window at each index.

    Args:
        key: values that the order depends on.
        sizes: tokens of each group, padding included.
        shares: whole numbers in the ratio in which groups come, none of them 0 (`whole_shares`).
        seq_len: targets of a window, S.
        global_batch: indices of a step.
    """

    def __init__(self, *, key: tuple[object, ...], sizes: Sequence[int], shares: Sequence[int], seq_len: int,
                 global_batch: int) -> None:
        assert len(sizes) == len(shares) > 0 and min(sizes) > 0 and min(shares) > 0, (sizes, shares)
        self._key, self._sizes = key_of(*key), np.asarray(sizes, np.int64)
        self._seq_len, self._global_batch = seq_len, global_batch
        self._cumulative = np.concatenate([[0], np.cumsum(shares, dtype=np.int64)])

    def windows(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 groups, and int64 first targets of the windows in their groups, at each index."""
        steps, slots = np.divmod(np.asarray(indices, np.int64), self._global_batch)
        if len(self._sizes) > 1:
            slots = permuted(slots, self._global_batch, subkeys(self._key, steps))
        groups, turns = whose_turn(steps * self._global_batch + slots, self._cumulative)
        return groups, self._places(groups, turns)

    def _places(self, groups: np.ndarray, turns: np.ndarray) -> np.ndarray:
        """First target of each turn of a group, after permuting the turns inside each epoch."""
        sizes, length = self._sizes[groups], self._seq_len
        epochs = turns * length // sizes
        first = -(-epochs * sizes // length)                     # first turn that begins in the epoch
        whole = (epochs + 1) * sizes // length - first           # turns that lie inside it
        inside = np.flatnonzero(turns < first + whole)
        turns = turns.copy()
        turns[inside] = first[inside] + permuted(turns[inside] - first[inside], whole[inside],
                                                 subkeys(self._key, groups[inside], epochs[inside]))
        return turns * length % sizes


def whose_turn(indices: np.ndarray, cumulative: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The group at each index, and which of its turns it is, if groups alternate as evenly as possible.

    The groups are halved until one is left. At every halving, of the first i turns, (i a + b // 2) // b are
    the left half's, whose share is a of b: a Sturmian word, which can be evaluated at any place. Every
    stretch of as many turns as the shares add up to, from a multiple of that on, has each group exactly as
    often as its share says.

    Args:
        indices: int64.
        cumulative: int64 [groups + 1], 0 and the sums of the first shares, the first two, ….

    Returns:
        int64 groups and int64 turns, one for each index.
    """
    turns = np.array(indices, np.int64)
    low, high = np.zeros_like(turns), np.full_like(turns, len(cumulative) - 1)
    for _ in range((len(cumulative) - 2).bit_length()):
        halved = high - low > 1
        middle = np.where(halved, (low + high) // 2, high)     # a single group is its own left half
        a, b = cumulative[middle] - cumulative[low], cumulative[high] - cumulative[low]
        rounds, rest = np.divmod(turns, b)
        before, after = ((part * a + b // 2) // b for part in (rest, rest + 1))
        to_left = after > before
        turns = np.where(to_left, rounds * a + before, turns - rounds * a - before)
        low, high = np.where(to_left, low, middle), np.where(to_left, middle, high)
    return low, turns


def whole_shares(shares: Sequence[Fraction]) -> list[int]:
    """The smallest whole numbers in this ratio.

    A ratio that needs large ones is rounded to parts of 2^30, of which no share gets 0.
    """
    simple = [share.limit_denominator(_SIMPLE) for share in shares]                # 1/10 for 0.1
    scale = math.lcm(*(share.denominator for share in simple))
    counts = [int(share * scale) for share in simple]
    counts = [count // (math.gcd(*counts) or 1) for count in counts]
    if sum(counts) <= _FINEST and all(counts):
        return counts
    total = sum(shares)
    return [max(round(share * _FINEST / total), 1) for share in shares]
