"""Sparse collective of sliced experts: every position sends its slice to all that compute the expert.

    gather     the slice of each position -> every holder, which lays the slices side by side
    reduce     every slice of a holder's gradient -> its position, which sums those of all holders, ascending

The idea is FSEP's (LAER-MoE): a hot expert is sent by all positions, a slice each, instead of whole by its
home. It is one uneven all-to-all of numbers instead of rows, since slices differ by a row. What a position
sends to itself goes with it.

Shapes: n sliced experts, m of them computed here, s slices sent, w numbers of this position's slice of an
expert, W numbers of an expert.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from math import prod

import torch
from torch import Tensor

from moetrain.comm.mesh import Group
from moetrain.comm.sparse.base import AsyncAllToAll, message
from moetrain.ops.pinned import DeviceTables
from moetrain.plan.placement import LayerPlacement, slice_columns


class PendingLayout:
    """Exchange of numbers under way, and how to lay out what it brings. `wait` returns that, once."""

    def __init__(self, exchange: AsyncAllToAll, lay_out: Callable[[Tensor], Tensor]) -> None:
        self.exchange, self.lay_out = exchange, lay_out

    def wait(self) -> Tensor:
        return self.lay_out(self.exchange.wait().flatten())


class Sliced:
    """Sparse collective of one position for sliced experts; see `Collective`.

    Args:
        placement: homes, copies and sliced experts of the layer.
        shapes: shapes of an expert's parameters, which lie side by side in a row of W numbers.
        position: this position.
        tables: where indices are put on the device.
    """

    def __init__(self, placement: LayerPlacement, shapes: Sequence[tuple[int, ...]], position: int,
                 tables: DeviceTables) -> None:
        positions, index = placement.positions, {expert: row for row, expert in enumerate(placement.sliced)}
        self.position = position
        self.columns = [slice_columns(shapes, at, positions) for at in range(positions)]
        self.widths = [sum(part.stop - part.start for part in parts) for parts in self.columns]
        self.width = sum(map(prod, shapes))
        towards = [[index[expert] for expert in placement.assembled_at(to)] for to in range(positions)]
        self.copies, self.counts = len(towards[position]), [len(rows) for rows in towards]
        self.index_s = tables.put(torch.tensor(sum(towards, []), dtype=torch.int64))

    def post_gather(self, slices: Sequence[Tensor], group: Group,
                    dtype: torch.dtype | None = None) -> PendingLayout:
        """Start bringing copies, [m, W], from slices: tensors [n, …] whose rows travel side by side."""
        sent, received = self._numbers()
        numbers = message(slices, self.index_s, dtype)
        return PendingLayout(_all_to_all(numbers, sent, received, group), self._assemble)

    def post_reduce(self, gradients_mW: Tensor, group: Group) -> PendingLayout:
        """Start sending the gradients of copies to the slices: rows [s, w] for `sum_at_home`."""
        sent, received = self._numbers()
        slices = (torch.cat([gradients_mW[:, part] for part in parts], dim=1) for parts in self.columns)
        numbers = torch.cat([each.flatten() for each in slices])
        return PendingLayout(_all_to_all(numbers, received, sent, group),
                             lambda flat: flat.view(len(self.index_s), self.widths[self.position]))

    def sum_at_home(self, own_nw: Tensor, received_sw: Tensor) -> Tensor:
        """Sum the gradients of all copies, holders ascending: [n, w].

        `own_nw` is zero, because a slice by itself computes nothing.
        """
        total_nw = own_nw.clone()
        for first, count in zip(accumulate(self.counts, initial=0), self.counts):
            rows = slice(first, first + count)
            total_nw.index_add_(0, self.index_s[rows], received_sw[rows])
        return total_nw

    def _numbers(self) -> tuple[list[int], list[int]]:
        """Numbers that the gather sends to each position, and that it receives from each."""
        width = self.widths[self.position]
        return [count * width for count in self.counts], [self.copies * width for width in self.widths]

    def _assemble(self, flat: Tensor) -> Tensor:
        """Lay the slices that have arrived side by side: [m, W]."""
        rows_mW = flat.new_empty(self.copies, self.width)
        blocks = flat.split([self.copies * width for width in self.widths])
        for parts, width, numbers in zip(self.columns, self.widths, blocks):
            widths = [part.stop - part.start for part in parts]
            for part, block in zip(parts, numbers.view(self.copies, width).split(widths, dim=1)):
                rows_mW[:, part] = block
        return rows_mW


def _all_to_all(numbers: Tensor, sent: list[int], received: list[int], group: Group) -> AsyncAllToAll:
    return AsyncAllToAll(numbers.reshape(-1, 1), tuple(sent), tuple(received), group)
