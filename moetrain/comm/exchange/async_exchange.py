"""An exchange under way, for every wire that moves one message: rows of several tensors side by side, forward and backward.

Forward, `exchange_async` starts the exchange and the handle's `wait` finishes it; backward it is the other way round: the gradient of
`wait` starts the reverse exchange, the gradient of `exchange_async` waits for it. Work between the two overlaps in both directions.
"""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moetrain.comm.exchange.base import Handle, Splits


class MessageTransport(Protocol):
    """Moves a message. `start` gives a tensor that may be read after `finish`; as the result of an operator it can be kept by
    activation checkpointing (model/activation_checkpointing.py), and `finish` then has nothing to wait for."""

    def start(self, message: Tensor, splits: Splits, *, returning: bool, read: bool) -> Tensor:
        """returning: on the way on which what was sent comes back, forward or backward. read: base.py."""
        ...

    def finish(self, message: Tensor) -> Tensor: ...


def exchange_async(transport: MessageTransport, tensors: tuple[Tensor, ...], splits: Splits, read: bool) -> Handle:
    """Start sending rows over a wire."""
    state = _ExchangeState(transport, splits, [tensor.is_floating_point() for tensor in tensors], read)
    posted = _Post.apply(state, *tensors)
    return _Pending(posted if isinstance(posted, tuple) else (posted,), state)


class ReadyRows(NamedTuple):
    """Rows that need not travel, as a handle."""

    tensors: tuple[Tensor, ...]

    def wait(self) -> tuple[Tensor, ...]:
        return self.tensors


class _Pending(NamedTuple):
    posted: tuple[Tensor, ...]
    state: "_ExchangeState"

    def wait(self) -> tuple[Tensor, ...]:
        received = _Wait.apply(self.state, *self.posted)
        return received if isinstance(received, tuple) else (received,)


class _ExchangeState:
    """One exchange under way, forward or backward. Several tensors travel as one message, row by row, as bytes."""

    def __init__(self, transport: MessageTransport, splits: Splits, floating: list[bool], read: bool) -> None:
        self.transport, self.splits, self.floating, self.read = transport, splits, floating, read
        self.sending: Tensor | None = None
        self.receiving: Tensor | None = None

    def start(self, tensors: Sequence[Tensor], splits: Splits, *, read: bool = True) -> None:
        """Post the exchange."""
        self.like = [(tensor.dtype, tensor.shape[1:]) for tensor in tensors]
        self.sending = pack(tensors)                     # both kept alive until `finish`
        self.receiving = self.transport.start(self.sending, splits, returning=not self.read, read=read)

    def finish(self) -> tuple[Tensor, ...]:
        received = unpack(self.transport.finish(self.receiving), self.like)
        self.sending = self.receiving = None
        return received


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
    def forward(ctx, state, *tensors):
        ctx.state = state
        state.start(tensors, state.splits, read=state.read)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx, *grads):                           # placeholders: the gradients are on their way
        back = iter(ctx.state.finish())
        return None, *(next(back) if floating else None for floating in ctx.state.floating)


class _Wait(torch.autograd.Function):
    """Finish the exchange."""

    @staticmethod
    def forward(ctx, state, *posted):
        ctx.state, ctx.rows = state, posted[0].shape[0]
        return state.finish()

    @staticmethod
    def backward(ctx, *grads):
        back = [grad if floating else None for grad, floating in zip(grads, ctx.state.floating)]     # integers have no gradient
        ctx.state.start([grad for grad in back if grad is not None], ctx.state.splits.reversed())
        return None, *(None if grad is None else grad.new_empty(1).expand(ctx.rows, *grad.shape[1:]) for grad in back)
