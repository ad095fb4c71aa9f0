"""The flat wire: one uneven all-to-all over the `ep` group.

Forward, `post` starts the collective and `wait` finishes it; backward it is the other way round: the gradient of `wait`
starts the reverse exchange, the gradient of `post` waits for it. Work between the two overlaps in both directions.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.comm.exchange.base import Handle, Splits
from moetrain.comm.mesh import Group


class FlatExchange:
    """All-to-all over one group; a group of one rank hands its rows back."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.positions = group.size

    def counts(self, sent_P: Tensor) -> Tensor:
        if self.group.process_group is None:
            return sent_P
        received_P = torch.empty_like(sent_P)
        dist.all_to_all_single(received_P, sent_P, group=self.group.process_group)
        return received_P

    def post(self, rows_RD: Tensor, splits: Splits) -> Handle:
        if self.group.process_group is None:
            return _Done(rows_RD)
        flight = _Flight(self.group.process_group, splits)
        return _Pending(_Post.apply(rows_RD, flight), flight)


class _Done:
    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def wait(self) -> Tensor:
        return self.rows


class _Pending:
    def __init__(self, posted: Tensor, flight: "_Flight") -> None:
        self.posted, self.flight = posted, flight

    def wait(self) -> Tensor:
        return _Wait.apply(self.posted, self.flight)


class _Flight:
    """One exchange under way, forward or backward."""

    def __init__(self, process_group: dist.ProcessGroup, splits: Splits) -> None:
        self.process_group, self.splits = process_group, splits
        self.work: dist.Work | None = None
        self.sending: Tensor | None = None              # both kept alive until the wait
        self.receiving: Tensor | None = None

    def start(self, rows: Tensor, splits: Splits) -> Tensor:
        """Post the collective; the returned buffer is being filled until `finish`."""
        self.sending = rows.contiguous()
        self.receiving = rows.new_empty(sum(splits.received), *rows.shape[1:])
        self.work = dist.all_to_all_single(
            self.receiving, self.sending, list(splits.received), list(splits.sent), group=self.process_group,
            async_op=True,
        )
        return self.receiving

    def finish(self) -> Tensor:
        self.work.wait()
        received = self.receiving
        self.work = self.sending = self.receiving = None
        return received


class _Post(torch.autograd.Function):
    """Start the exchange. The output stands for the rows on their way: only `_Wait` may take it."""

    @staticmethod
    def forward(ctx, rows, flight):
        ctx.flight = flight
        flight.start(rows, flight.splits)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx, grad):                            # `grad` is the buffer that _Wait.backward posted
        return ctx.flight.finish(), None


class _Wait(torch.autograd.Function):
    """Finish the exchange."""

    @staticmethod
    def forward(ctx, posted, flight):
        ctx.flight = flight
        return flight.finish()

    @staticmethod
    def backward(ctx, grad):
        return ctx.flight.start(grad, ctx.flight.splits.reversed()), None
