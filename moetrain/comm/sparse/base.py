"""Sparse collectives over a placement: experts from their homes to their copies, and gradients back.

    sparse all-gather       every position gets the experts that the placement copies to it        spAG
    sparse reduce-scatter   the gradients of all copies are summed at the home                      spRS

Hecate, arXiv 2502.02581, section 3. There are two forms, one in each file, behind one call (forms.py);
plan/transfers.py says what travels in each. Both bring the same bits. Gradients are summed in float32 or
better, in an order that the placement fixes, whatever arrives first: the same bits every time. The forms
group a sum differently.

This file has what both are made of. A stage is one uneven all-to-all, ordered by position and then by expert
on both sides.

Shapes: h rows here to send from, s rows sent (a row once for each destination), W numbers of an expert.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.comm.mesh import Group
from moetrain.ops.pinned import DeviceTables
from moetrain.plan.transfers import Stage


class Handle(Protocol):
    """Collective under way."""

    def wait(self) -> Tensor:
        """Return the rows received, once. All positions of the group wait for handles in the same order."""
        ...


class Collective(Protocol):
    """Sparse collective of one position under one placement."""

    copies: int                  # copies that come here

    def post_gather(self, homes: Sequence[Tensor], group: Group, dtype: torch.dtype | None = None) -> Handle:
        """Start bringing copies. Every position of the group calls it.

        Args:
            homes: tensors [h, …] whose rows travel side by side, one for each expert.
            group: positions that exchange.
            dtype: dtype in which rows travel; that of the tensors if None.

        Returns:
            A handle whose `wait` returns rows [copies, W], in the order of physical slots.
        """
        ...

    def post_reduce(self, gradients_cW: Tensor, group: Group) -> Handle:
        """Start sending the gradients of copies home. Every position of the group calls it.

        Returns:
            A handle whose `wait` returns rows for `sum_at_home`.
        """
        ...

    def sum_at_home(self, own_hW: Tensor, received_sW: Tensor) -> Tensor:
        """Sum the home's own gradients and those of the copies, [h, W]. Columns may be summed in parts."""
        ...


class SendPlan(NamedTuple):
    """What one position sends and receives in a stage. Gradients take the same plan in the other direction.

    Attributes:
        position: this position.
        index_s: int64 [s], which row here is sent, by destination and then by expert.
        sent: rows to each position.
        received: rows from each position.
        begins: first of the rows sent to each position.
    """

    position: int
    index_s: Tensor
    sent: tuple[int, ...]
    received: tuple[int, ...]
    begins: tuple[int, ...]


def send_plan(stage: Stage, position: int, positions: int, rows: Sequence[int],
              tables: DeviceTables) -> SendPlan:
    """Plan what a position sends and receives in a stage.

    Args:
        stage: transfers of one exchange.
        position: this position.
        positions: number of positions.
        rows: experts whose rows are here to be sent, in their order.
        tables: where indices are put on the device.
    """
    row = {expert: index for index, expert in enumerate(rows)}
    leaving = sorted((to, expert) for expert, source, to in stage if source == position)
    sent = Counter(to for to, _ in leaving)
    received = Counter(source for _, source, to in stage if to == position)
    sent_P = tuple(sent[at] for at in range(positions))
    index_s = tables.put(torch.tensor([row[expert] for _, expert in leaving], dtype=torch.int64))
    return SendPlan(position, index_s, sent_P, received=tuple(received[at] for at in range(positions)),
                    begins=tuple(accumulate(sent_P, initial=0))[:-1])


def arrivals(stage: Stage, position: int) -> list[int]:
    """Experts that a stage brings to a position, in the order of the rows that it receives."""
    return [expert for _, expert in sorted(
        (source, expert) for expert, source, to in stage if to == position)]


class AsyncAllToAll:
    """All-to-all under way. `wait` returns the rows received, once.

    Args:
        message: rows to send, ordered by destination.
        sent: rows to each position.
        received: rows from each position.
        group: positions that exchange.
    """

    def __init__(self, message: Tensor, sent: tuple[int, ...], received: tuple[int, ...],
                 group: Group) -> None:
        self.message = message                           # kept alive until it has been sent
        self.result: Tensor | None = message.new_empty(sum(received), message.shape[1])
        self.work = dist.all_to_all_single(self.result, message, list(received), list(sent),
                                           group=group.process_group, async_op=True)

    def wait(self) -> Tensor:
        assert self.result is not None, "a collective is waited for once"
        self.work.wait()
        result, self.result, self.message = self.result, None, None
        return result


def message(homes: Sequence[Tensor], index_s: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Pack rows to send, [s, W].

    Args:
        homes: tensors [h, …] whose rows travel side by side.
        index_s: int64 [s], which row is sent.
        dtype: dtype in which rows travel; that of the tensors if None.
    """
    rows_sW = torch.cat([tensor[index_s].flatten(1) for tensor in homes], dim=1)
    return rows_sW if dtype is None else rows_sW.to(dtype)


def add_ascending(total_hW: Tensor, own_hW: Tensor, received_sW: Tensor, send_plan: SendPlan,
                  positions: Iterable[int]) -> None:
    """Add the gradients of some positions to a total in place, one position after the other.

    Args:
        total_hW: [h, W], where they are added.
        own_hW: [h, W], this position's own part, which is added at its place in the order.
        received_sW: [s, W], gradients of the rows that were sent.
        send_plan: where those rows went.
        positions: positions to add, in this order.
    """
    for position in positions:
        if position == send_plan.position:
            total_hW += own_hW
        elif send_plan.sent[position]:       # an expert goes to a position once: no index comes twice
            rows = slice(send_plan.begins[position], send_plan.begins[position] + send_plan.sent[position])
            total_hW.index_add_(0, send_plan.index_s[rows], received_sW[rows])
