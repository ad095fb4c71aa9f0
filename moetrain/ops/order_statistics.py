"""Order statistics of float32 values that lie on many ranks, to the bit, by sums of integers alone.

    key(x) = bits of x as int32, with all bits but the sign inverted where x < 0

Keys are ordered as the values are (-0 lies below 0), so the value of rank n (n values lie below it) is found
digit by digit, from the leading one. Among the keys that begin with the digits found so far, count those of
each next digit, and beside them all smaller and all larger keys. Add up the counts over ranks; the next digit
is the first up to which more than n keys are counted. A key of 32 bits has three digits of 11, 11 and 10
bits. Sums of integers do not depend on their order: the result has the same bits however the values are
divided.

Infinity stands for a value that does not exist, such as one of padding. It lies above all others, and
`num_finite` counts the others.

Shapes: E sets of values, N values of a set on this rank, B values of a digit and two columns beside them.
"""

import torch
from torch import Tensor

DIGITS = (11, 11, 10)                                    # bits, from the leading ones
FIRST = -1 << (DIGITS[0] - 1)                            # smallest leading digit, that of negative numbers
_INFINITE = (0x7F800000 >> (32 - DIGITS[0])) - FIRST     # digits below that of infinity: of finite values
_PIECE = 1 << 22                                         # keys that are looked at together: bounds memory


def order_keys(values_EN: Tensor) -> Tensor:
    """Turn float32 values into int32 keys of the same order, in their memory."""
    keys_EN = values_EN.view(torch.int32)
    for piece_EN in _pieces(keys_EN):
        _invert_below_zero(piece_EN)
    return keys_EN


def values_of_keys(keys: Tensor) -> Tensor:
    """Map keys back to their float32 values."""
    return _invert_below_zero(keys.clone()).view(torch.float32)


def _invert_below_zero(bits: Tensor) -> Tensor:
    return bits.bitwise_xor_((bits >> 31).bitwise_and_(0x7FFFFFFF))


def _pieces(keys_EN: Tensor) -> tuple[Tensor, ...]:
    return keys_EN.split(max(1, _PIECE // max(1, keys_EN.shape[1])))


def digit_counts(keys_EN: Tensor, base_E: Tensor, digit: int) -> Tensor:
    """Count keys by their next digit.

    Args:
        keys_EN: int32 [E, N].
        base_E: int32 [E], the digits found so far, and 0 for this one; FIRST before the first.
        digit: number of the digit, from 0.

    Returns:
        int32 [E, B]: smaller keys than begin with the digits found, those with each value of the digit, and
        larger ones.
    """
    pieces = _pieces(keys_EN)
    counts = [_counts(*piece, digit) for piece in zip(pieces, base_E.split(len(pieces[0])))]
    return counts[0] if len(counts) == 1 else torch.cat(counts)


def _counts(keys_EN: Tensor, base_E: Tensor, digit: int) -> Tensor:
    base_E1, bins = base_E[:, None], 1 << DIGITS[digit]
    leading_EN = keys_EN >> sum(DIGITS[digit + 1:])
    # The difference of any key and the base could overflow.
    columns_EN = leading_EN.clamp_(base_E1 - 1, base_E1 + bins).sub_(base_E1 - 1)
    # The second is two to three times as fast, but on a GPU it makes the host wait for the device.
    return (_scattered if keys_EN.is_cuda else _binned)(columns_EN, bins + 2)


def _scattered(columns_EN: Tensor, bins: int) -> Tensor:
    """Count the columns of each row, int32 [E, bins]."""
    ones = torch.ones((), dtype=torch.int32, device=columns_EN.device).expand_as(columns_EN)
    return columns_EN.new_zeros(len(columns_EN), bins).scatter_add_(1, columns_EN.long(), ones)


def _binned(columns_EN: Tensor, bins: int) -> Tensor:
    """Count the same by one pass of `bincount` over all rows."""
    size = len(columns_EN) * bins
    columns_EN += torch.arange(0, size, bins, dtype=torch.int32)[:, None]
    return torch.bincount(columns_EN.view(-1), minlength=size).view(-1, bins).int()


def num_finite(up_to_EB: Tensor) -> Tensor:
    """Number of values that exist, int64 [E], by the first digit's counts up to each column."""
    return up_to_EB[:, _INFINITE].long()


def next_base(up_to_EB: Tensor, base_E: Tensor, rank_E: Tensor, digit: int) -> Tensor:
    """Find the next digit of the value of a rank.

    Args:
        up_to_EB: int32 [E, B], counts of all ranks, of each column and those before it.
        base_E: int32 [E], by which `digit_counts` counted.
        rank_E: int32 [E], rank of the value among all values.
        digit: number of the digit.

    Returns:
        int32 [E], the digits found by now, and 0 for the next one. After the last digit that is the key.
    """
    column_E1 = torch.searchsorted(up_to_EB, rank_E[:, None], right=True, out_int32=True)
    found_E = base_E - 1 + column_E1[:, 0]
    return found_E << DIGITS[digit + 1] if digit + 1 < len(DIGITS) else found_E
