"""The flat wire: one uneven all-to-all over the `ep` group.

Forward, `post` starts the collective and `wait` finishes it; backward it is the other way round: the gradient of `wait`
starts the reverse exchange, the gradient of `post` waits for it. Work between the two overlaps in both directions.
"""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.comm.exchange.base import Handle, Splits
from moetrain.comm.mesh import Group
from moetrain.ops.extension import define


class FlatExchange:
    """All-to-all over one group; a group of one rank hands its rows back."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.positions, self.position = group.size, group.position

    def counts(self, sent_P: Tensor) -> Tensor:
        if self.group.process_group is None:
            return sent_P
        even = [len(sent_P) // self.positions] * self.positions
        return wait(post(sent_P, even, even, self.group.process_group))

    def post(self, tensors: tuple[Tensor, ...], splits: Splits, *, read: bool = True) -> Handle:
        if self.group.process_group is None:
            return _Done(tensors)
        flight = _Flight(self.group.process_group, splits, [tensor.is_floating_point() for tensor in tensors], read)
        posted = _Post.apply(flight, *tensors)
        return _Pending(posted if isinstance(posted, tuple) else (posted,), flight)


class _Done(NamedTuple):
    tensors: tuple[Tensor, ...]

    def wait(self) -> tuple[Tensor, ...]:
        return self.tensors


class _Pending(NamedTuple):
    posted: tuple[Tensor, ...]
    flight: "_Flight"

    def wait(self) -> tuple[Tensor, ...]:
        received = _Wait.apply(self.flight, *self.posted)
        return received if isinstance(received, tuple) else (received,)


class _Flight:
    """One exchange under way, forward or backward. Several tensors travel as one message, row by row, as bytes."""

    def __init__(self, process_group: dist.ProcessGroup, splits: Splits, floating: list[bool], read: bool) -> None:
        self.process_group, self.splits, self.floating, self.read = process_group, splits, floating, read
        self.sending: Tensor | None = None
        self.receiving: Tensor | None = None

    def start(self, tensors: Sequence[Tensor], splits: Splits, *, read: bool = True) -> None:
        """Post the collective."""
        self.like = [(tensor.dtype, tensor.shape[1:]) for tensor in tensors]
        self.sending = pack(tensors)                     # both kept alive until `finish`
        self.receiving = post(self.sending, splits.received, splits.sent, self.process_group, read=read)

    def finish(self) -> tuple[Tensor, ...]:
        received = unpack(wait(self.receiving), self.like)
        self.sending = self.receiving = None
        return received


def post(message: Tensor, received: Sequence[int], sent: Sequence[int], process_group: dist.ProcessGroup, *,
         read: bool = True) -> Tensor:
    """Start an all-to-all of rows. The result is a plain tensor that may be read after `wait`.

    The functional form of the collective: being an operator with a result, it can be saved by activation checkpointing
    (model/recompute.py), which then does not communicate a second time.
    """
    exchange = torch.ops._c10d_functional.all_to_all_single if read else _all_to_all_unread
    return exchange(message, list(received), list(sent), process_group.group_name)


# The same under another name, for rows that backward never reads: what runs again for backward does without them.
_all_to_all_unread = define(
    "all_to_all_single_unread(Tensor message, SymInt[] received, SymInt[] sent, str group) -> Tensor",
    reference=lambda *arguments: torch.ops._c10d_functional.all_to_all_single(*arguments),
    fake=lambda message, received, sent, group: message.new_empty(sum(received), *message.shape[1:]),
)


def wait(message: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(message)


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """One message: the tensor itself when there is one, else uint8 [R, bytes of all rows side by side]."""
    if len(tensors) == 1:
        return tensors[0].contiguous()
    return torch.cat([_dense(t.reshape(t.shape[0], prod(t.shape[1:]))).view(torch.uint8) for t in tensors], dim=1)


def unpack(message: Tensor, like: list[tuple[torch.dtype, torch.Size]]) -> tuple[Tensor, ...]:
    """The tensors of a message, by their dtypes and row shapes."""
    if len(like) == 1:
        return (message,)
    widths = [prod(shape) * dtype.itemsize for dtype, shape in like]
    parts = message.split(widths, dim=1)
    copies = (part.clone(memory_format=torch.contiguous_format) for part in parts)       # a view may lie at an odd offset
    return tuple(part.view(dtype).view(message.shape[0], *shape) for part, (dtype, shape) in zip(copies, like))


def _dense(rows_RW: Tensor) -> Tensor:
    """Contiguous, also where one row alone counts as contiguous whatever its stride."""
    return rows_RW if rows_RW.is_contiguous() and rows_RW.stride(1) == 1 else torch.empty_like(
        rows_RW, memory_format=torch.contiguous_format).copy_(rows_RW)


class _Post(torch.autograd.Function):
    """Start the exchange. The outputs stand for the rows on their way: only `_Wait` may take them."""

    @staticmethod
    def forward(ctx, flight, *tensors):
        ctx.flight = flight
        flight.start(tensors, flight.splits, read=flight.read)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx, *grads):                           # placeholders: the gradients are on their way
        back = iter(ctx.flight.finish())
        return None, *(next(back) if floating else None for floating in ctx.flight.floating)


class _Wait(torch.autograd.Function):
    """Finish the exchange."""

    @staticmethod
    def forward(ctx, flight, *posted):
        ctx.flight, ctx.rows = flight, posted[0].shape[0]
        return flight.finish()

    @staticmethod
    def backward(ctx, *grads):
        back = [grad if floating else None for grad, floating in zip(grads, ctx.flight.floating)]     # integers have no gradient
        ctx.flight.start([grad for grad in back if grad is not None], ctx.flight.splits.reversed())
        return None, *(None if grad is None else grad.new_empty(1).expand(ctx.rows, *grad.shape[1:]) for grad in back)
