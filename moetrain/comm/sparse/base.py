"""Sparse collectives over a placement: experts from their homes to where copies are wanted, and gradients back.

    sparse all-gather       every position gets the experts that the placement copies to it        spAG
    sparse reduce-scatter   the gradients of all copies are summed at the home                      spRS

(Hecate, arXiv 2502.02581, section 3.) Two forms, one a file, behind one call (forms.py); plan/transfers.py says what travels
in each. They bring the same bits. Sums are taken in an order that the placement fixes, whatever arrives first, in float32 or
better: the same bits every time. The forms group a sum differently.

Here: what they are made of. A leg is one uneven all-to-all, ordered by position and then by expert on both sides.

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
from moetrain.plan.transfers import Leg


class Handle(Protocol):
    """A collective under way."""

    def wait(self) -> Tensor:
        """Its rows, once. Every position of the group calls it, and all of them in one order."""
        ...


class Collective(Protocol):
    """What one position sends and receives under one placement."""

    copies: int                  # that come here

    def post_gather(self, homes: Sequence[Tensor], group: Group, dtype: torch.dtype | None = None) -> Handle:
        """Start bringing copies: rows [copies, W] in the order of their slots. Every position of the group calls it.

        homes: tensors [h, …] that travel side by side as one row for each expert. dtype: on the wire, theirs when None.
        """
        ...

    def post_reduce(self, gradients_cW: Tensor, group: Group) -> Handle:
        """Start sending the gradients of copies home: rows for `sum_at_home`. Every position of the group calls it."""
        ...

    def sum_at_home(self, own_hW: Tensor, received_sW: Tensor) -> Tensor:
        """Own gradients and those of the copies: [h, W]. Columns may be summed by parts."""
        ...


class SendPlan(NamedTuple):
    """What one position sends and receives in a leg. Gradients take the same send_plan the other way."""

    position: int
    index_s: Tensor              # int64: which row here is sent, by destination and then by expert
    sent: tuple[int, ...]        # rows to each position
    received: tuple[int, ...]    # rows from each position
    begins: tuple[int, ...]      # first of the rows sent to each position


def send_plan(leg: Leg, position: int, positions: int, rows: Sequence[int], tables: DeviceTables) -> SendPlan:
    """A position's send_plan. rows: experts that lie here to be sent, in their order."""
    row = {expert: index for index, expert in enumerate(rows)}
    leaving = sorted((to, expert) for expert, source, to in leg if source == position)
    sent, received = Counter(to for to, _ in leaving), Counter(source for _, source, to in leg if to == position)
    sent_P = tuple(sent[at] for at in range(positions))
    return SendPlan(position, tables.put(torch.tensor([row[expert] for _, expert in leaving], dtype=torch.int64)),
                sent_P, tuple(received[at] for at in range(positions)), tuple(accumulate(sent_P, initial=0))[:-1])


def arrivals(leg: Leg, position: int) -> list[int]:
    """Experts that a leg brings to a position, in the order in which they lie there."""
    return [expert for _, expert in sorted((source, expert) for expert, source, to in leg if to == position)]


class AsyncAllToAll:
    """One all-to-all under way. `wait` gives the rows received, once."""

    def __init__(self, message: Tensor, sent: tuple[int, ...], received: tuple[int, ...], group: Group) -> None:
        self.message = message                           # kept alive until it has been sent
        self.result: Tensor | None = message.new_empty(sum(received), message.shape[1])
        self.work = dist.all_to_all_single(self.result, message, list(received), list(sent), group=group.process_group,
                                           async_op=True)

    def wait(self) -> Tensor:
        assert self.result is not None, "a collective is taken once"
        self.work.wait()
        result, self.result, self.message = self.result, None, None
        return result


def message(homes: Sequence[Tensor], index_s: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Rows of tensors [h, …], side by side: [s, W]."""
    rows_sW = torch.cat([tensor[index_s].flatten(1) for tensor in homes], dim=1)
    return rows_sW if dtype is None else rows_sW.to(dtype)


def add_ascending(total_hW: Tensor, own_hW: Tensor, received_sW: Tensor, send_plan: SendPlan, positions: Iterable[int]) -> None:
    """Add what came from some positions, one after the other, and the own part in its place."""
    for position in positions:
        if position == send_plan.position:
            total_hW += own_hW
        elif send_plan.sent[position]:                        # an expert goes to a position once: no two rows of one index
            rows = slice(send_plan.begins[position], send_plan.begins[position] + send_plan.sent[position])
            total_hW.index_add_(0, send_plan.index_s[rows], received_sW[rows])
