"""The order of training windows: a pure function of the index, so that sample (step, slot) can be asked for directly.

Index g = (step - 1) * global_batch + slot counts samples from the start of the run. There is no state to save, a batch costs
the same for every size of text, and how many ranks read is of no concern.

1. Several groups take turns by their shares, as evenly as whole numbers can (`whose_turn`). Inside a step the slots are
   then permuted, so that no slot, and with it no rank, always reads the same group.
2. Turn t of a group reads the targets t S … t S + S - 1 of its tokens repeated for ever: an epoch is exactly its tokens. The
   turns inside an epoch are permuted, by a key of (seed, fingerprint, group, epoch); one across the border of two epochs stays
   where it is, so that no token comes again before all others have come.

A single group ends its epochs with a window that is not full instead (`Windows` in data/batches/windows.py): its size counts as the next
multiple of S, and so no turn crosses a border.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from moetrain.data.batches.permutation import key_of, permuted, subkeys

ORDER = "windows-2"            # raise it when the same index gives another window
_SIMPLE = 10_000                # shares whose ratio is one of small numbers are kept to the letter
_FINEST = 1 << 30               # what other shares are rounded to parts of; its square fits an int64


class Order:
    """Which window stands at an index.

    Args:
        key: what the order depends on.
        sizes: tokens of each group, padding included.
        shares: whole numbers in the ratio in which groups come, none 0 (`whole_shares`).
        seq_len: targets of a window, S.
        global_batch: indices of a step.
    """

    def __init__(self, *, key: tuple[object, ...], sizes: Sequence[int], shares: Sequence[int], seq_len: int,
                 global_batch: int) -> None:
        assert len(sizes) == len(shares) > 0 and min(sizes) > 0 and min(shares) > 0, (sizes, shares)
        self._key, self._sizes, self._seq_len, self._global_batch = key_of(*key), np.asarray(sizes,
                                                                                             np.int64), seq_len, global_batch
        self._cumulative = np.concatenate([[0], np.cumsum(shares, dtype=np.int64)])

    def windows(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(group, first target of the window in the group), int64."""
        steps, slots = np.divmod(np.asarray(indices, np.int64), self._global_batch)
        if len(self._sizes) > 1:
            slots = permuted(slots, self._global_batch, subkeys(self._key, steps))
        groups, turns = whose_turn(steps * self._global_batch + slots, self._cumulative)
        return groups, self._places(groups, turns)

    def _places(self, groups: np.ndarray, turns: np.ndarray) -> np.ndarray:
        sizes, length = self._sizes[groups], self._seq_len
        epochs = turns * length // sizes
        first = -(-epochs * sizes // length)                     # turn that begins the epoch, or begins in it
        whole = (epochs + 1) * sizes // length - first           # turns that lie in it
        inside = np.flatnonzero(turns < first + whole)
        turns = turns.copy()
        turns[inside] = first[inside] + permuted(turns[inside] - first[inside], whole[inside],
                                                 subkeys(self._key, groups[inside], epochs[inside]))
        return turns * length % sizes


def whose_turn(indices: np.ndarray, cumulative: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(group, which of its turns) at each index, when groups alternate as evenly as whole numbers can.

    The groups are halved until one is left. At every halving, of the first i turns, (i a + b // 2) // b are the left half's,
    whose share is a of b: a Sturmian word, which can be read anywhere. Every stretch of as many turns as the shares add up to,
    from a multiple of that on, has each group exactly as often as its share says.

    cumulative: 0 and the sums of the first shares, the first two, …
    """
    turns = np.array(indices, np.int64)
    low, high = np.zeros_like(turns), np.full_like(turns, len(cumulative) - 1)
    for _ in range((len(cumulative) - 2).bit_length()):
        halved = high - low > 1
        middle = np.where(halved, (low + high) // 2, high)  # what is one group already is its own left half
        a, b = cumulative[middle] - cumulative[low], cumulative[high] - cumulative[low]
        rounds, rest = np.divmod(turns, b)
        before, after = ((part * a + b // 2) // b for part in (rest, rest + 1))
        to_left = after > before
        turns = np.where(to_left, rounds * a + before, turns - rounds * a - before)
        low, high = np.where(to_left, low, middle), np.where(to_left, middle, high)
    return low, turns


def whole_shares(shares: Sequence[Fraction]) -> list[int]:
    """The smallest whole numbers in this ratio; of one that needs large ones, the nearest parts of 2^30, and never 0."""
    simple = [share.limit_denominator(_SIMPLE) for share in shares]                # 1/10 for 0.1
    scale = math.lcm(*(share.denominator for share in simple))
    counts = [int(share * scale) for share in simple]
    counts = [count // (math.gcd(*counts) or 1) for count in counts]
    if sum(counts) <= _FINEST and all(counts):
        return counts
    total = sum(shares)
    return [max(round(share * _FINEST / total), 1) for share in shares]
