"""Order statistics of float32 values that lie on many ranks, to the bit, by sums of integers alone.

    key(x) = bits of x as int32, with all bits but the sign inverted where x < 0

Keys are ordered as the values are (-0 lies below 0), so the value of rank n (n values lie below it) is found
digit by digit, from the leading one: count the keys of each digit among those that begin with the digits
found so far, add the counts over ranks, and go on in the digit that holds rank n. A key of 32 bits has three
digits of 11, 11 and 10 bits. Sums of integers do not depend on their order: the result has the same bits
however the values are divided.

Infinity stands for a value that does not exist, such as one of padding. It lies above all others, and
`num_finite` counts the others.

Shapes: E sets of values, N values of a set on this rank, B values of a digit.
"""

import torch
from torch import Tensor

DIGITS = (11, 11, 10)                                    # bits, from the leading ones
_LEADING = 1 << (DIGITS[0] - 1)                          # makes the leading digit 0 for the smallest key
_INFINITE = (0x7F800000 >> (32 - DIGITS[0])) + _LEADING  # leading digit of infinity, above all finite values


def order_keys(values: Tensor) -> Tensor:
    """Map float32 values to int32 keys of the same order."""
    return _inverted_below_zero(values.contiguous().view(torch.int32))


def values_of_keys(keys: Tensor) -> Tensor:
    """Map keys back to their float32 values."""
    return _inverted_below_zero(keys).view(torch.float32)


def _inverted_below_zero(bits: Tensor) -> Tensor:
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def digit_counts(keys_EN: Tensor, found_E: Tensor | None, digit: int) -> Tensor:
    """Count the values of a digit among the keys that begin with the digits found so far.

    Args:
        keys_EN: int32 [E, N].
        found_E: int32 [E], the digits found so far; None for the first.
        digit: number of the digit, from 0.

    Returns:
        int32 [E, B].
    """
    bins = 1 << DIGITS[digit]
    leading_EN = keys_EN >> sum(DIGITS[digit + 1:])
    values_EN = (leading_EN & bins - 1) if digit else leading_EN + _LEADING
    counted_EN = None if found_E is None else (leading_EN >> DIGITS[digit]) == found_E[:, None]
    # The second is two to three times as fast, but on a GPU it makes the host wait for the device.
    return (_scattered if keys_EN.is_cuda else _binned)(values_EN, counted_EN, bins)


def _scattered(values_EN: Tensor, counted_EN: Tensor | None, bins: int) -> Tensor:
    """Count the values of each row that are to be counted; None: all."""
    ones_EN = torch.ones_like(values_EN) if counted_EN is None else counted_EN.int()
    return values_EN.new_zeros(len(values_EN), bins).scatter_add_(1, values_EN.long(), ones_EN)


def _binned(values_EN: Tensor, counted_EN: Tensor | None, bins: int) -> Tensor:
    """Count the same by one pass of `bincount` over all rows."""
    columns = len(values_EN) * bins                      # an extra one takes what is not to be counted
    columns_EN = values_EN + torch.arange(0, columns, bins, dtype=torch.int32)[:, None]
    if counted_EN is not None:
        columns_EN = columns_EN.where(counted_EN, columns)
    return torch.bincount(columns_EN.view(-1), minlength=columns + 1)[:-1].view(-1, bins).int()


def num_finite(counts_EB: Tensor) -> Tensor:
    """Number of values that exist, int64 [E], by the summed counts of the first digit."""
    return counts_EB[:, :_INFINITE].sum(1)


def next_digit(counts_EB: Tensor, found_E: Tensor | None, rank_E: Tensor) -> tuple[Tensor, Tensor]:
    """Find the next digit of the value of a rank.

    Args:
        counts_EB: int32 [E, B], counts of the digit, summed over all ranks.
        found_E: int32 [E], the digits found so far; None for the first.
        rank_E: int64 [E], rank of the value among the keys that begin with these digits.

    Returns:
        The digits found by now, int32 [E], and the rank among the keys that begin with them. After the last
        digit they are the key.
    """
    up_to_EB = counts_EB.cumsum(1)
    digit_E1 = (up_to_EB <= rank_E[:, None]).sum(1, keepdim=True).clamp(max=counts_EB.shape[1] - 1)
    below_E1 = up_to_EB.gather(1, digit_E1) - counts_EB.gather(1, digit_E1)
    digit_E = digit_E1[:, 0].int()
    found_E = (digit_E - _LEADING if found_E is None
               else (found_E << (counts_EB.shape[1].bit_length() - 1)) | digit_E)
    return found_E, rank_E - below_E1[:, 0]
