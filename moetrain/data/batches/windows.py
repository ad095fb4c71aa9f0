"""Windows of a token stream: ranges are laid end to end in groups and cut into windows of seq_len targets.

A window is the positions of its *targets*. The input of a target is the token before it in the stream, also
where a range begins; that of the stream's first token is the stream's last. So every token is a target, those
at a beginning too.

A group that wraps continues with its beginning behind its end, and all its windows are full. One that does
not wrap has a shorter window at its end.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Piece(NamedTuple):
    """Targets at `start` … `start + length - 1` of a stream."""

    start: int
    length: int


class Windows:
    """The windows of all groups by number.

    A number stands for a group and a first target, and no two windows share one.

    Args:
        groups: for each group, the (begin, end) of its ranges in the stream, in their order.
        seq_len: targets of a full window.
        wraps: whether a group continues with its beginning.
    """

    def __init__(self, groups: Sequence[Sequence[tuple[int, int]]], *, seq_len: int, wraps: bool) -> None:
        self.seq_len, self.wraps = seq_len, wraps
        merged = [_merged(ranges) for ranges in groups]
        self.tokens = np.array([sum(end - begin for begin, end in ranges) for ranges in merged], np.int64)
        # Sizes as the order counts them: without wrapping every group ends on a whole window.
        self.sizes = self.tokens if wraps else -(-self.tokens // seq_len) * seq_len
        self._spacing = np.gcd(self.sizes, seq_len)     # between possible starts of a group's windows
        self._numbers = np.concatenate([[0], np.cumsum(self.sizes // self._spacing)]).astype(np.int64)
        every = [place for ranges in merged for place in ranges]
        self._begins = np.array([begin for begin, _ in every], np.int64)
        lengths = [end - begin for begin, end in every]
        self._addresses = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self._groups = np.concatenate([[0], np.cumsum(self.tokens)])

    @property
    def count(self) -> int:
        """Window numbers run from 0 to count - 1."""
        return int(self._numbers[-1])

    def numbers(self, groups: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Numbers of the windows that begin at these places of groups."""
        return self._numbers[groups] + places // self._spacing[groups]

    def pieces(self, number: int) -> list[Piece]:
        """Ranges of the window with this number, in order."""
        group = int(np.searchsorted(self._numbers, number, "right")) - 1
        return self.pieces_at(group, (number - int(self._numbers[group])) * int(self._spacing[group]))

    def pieces_at(self, group: int, place: int) -> list[Piece]:
        """Ranges of the window that begins at this place of a group, in order."""
        begin, end = int(self._groups[group]), int(self._groups[group + 1])
        left = self.seq_len if self.wraps else min(self.seq_len, end - begin - place)
        address, found = begin + place, []
        part = int(np.searchsorted(self._addresses, address, "right")) - 1
        while left > 0:
            offset = address - int(self._addresses[part])
            length = min(left, int(self._addresses[part + 1]) - address)
            found.append(Piece(int(self._begins[part]) + offset, length))
            left, address, part = left - length, address + length, part + 1
            if address == end and left:
                address = begin
                part = int(np.searchsorted(self._addresses, begin, "right")) - 1
        return found


def _merged(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The ranges without empty ones, with ranges that touch joined."""
    found: list[tuple[int, int]] = []
    for begin, end in ranges:
        if found and found[-1][1] == begin:
            found[-1] = (found[-1][0], end)
        elif begin < end:
            found.append((begin, end))
    return found
