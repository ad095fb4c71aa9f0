"""Differentiable asynchronous exchange, for every backend that moves one message.

Rows of several tensors travel side by side. In forward `exchange_async` starts the exchange and the handle's
`wait` finishes it. In backward it is the other way round: the gradient of `wait` starts the reverse exchange,
and the gradient of `exchange_async` waits for it. Work between the two overlaps with the exchange in both
directions.

Shapes: R rows, W numbers of a row.
"""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moetrain.comm.exchange.base import Handle, Splits


class MessageTransport(Protocol):
    """Transport of one message, which an exchange backend implements.

    `start` returns a tensor that may be read after `finish`. As the result of an operator it can be kept by
    activation checkpointing (model/activation_checkpointing.py), and `finish` then has nothing to wait for.
    """

    def start(self, message: Tensor, splits: Splits, *, returning: bool, read: bool) -> Tensor:
        """Start moving a message.

        Args:
            message: [R, …], rows ordered by destination.
            splits: rows to and from each position.
            returning: whether the exchange brings back what was dispatched: the combine, in forward and in
                backward.
            read: whether backward reads what arrives (`Exchange.post`).
        """
        ...

    def finish(self, message: Tensor) -> Tensor: ...


def exchange_async(transport: MessageTransport, tensors: tuple[Tensor, ...], splits: Splits,
                   read: bool) -> Handle:
    """Start an exchange of rows.

    Args:
        transport: what moves the message.
        tensors: rows of one exchange, with one first dim.
        splits: rows to and from each position.
        read: whether backward reads what arrives (`Exchange.post`).

    Returns:
        A handle whose `wait` returns the rows received.
    """
    state = _ExchangeState(transport, splits, [tensor.is_floating_point() for tensor in tensors], read)
    posted = _Post.apply(state, *tensors)
    return _Pending(posted if isinstance(posted, tuple) else (posted,), state)


class ReadyRows(NamedTuple):
    """Handle of rows that do not travel."""

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
    """One exchange under way, in forward or in backward. Several tensors travel as bytes of one message."""

    def __init__(self, transport: MessageTransport, splits: Splits, floating: list[bool], read: bool) -> None:
        self.transport, self.splits, self.floating, self.read = transport, splits, floating, read
        self.sending: Tensor | None = None
        self.receiving: Tensor | None = None

    def start(self, tensors: Sequence[Tensor], splits: Splits, *, read: bool = True) -> None:
        """Pack the tensors and start the exchange."""
        self.like = [(tensor.dtype, tensor.shape[1:]) for tensor in tensors]
        self.sending = pack(tensors)                     # it and `receiving` stay alive until `finish`
        self.receiving = self.transport.start(self.sending, splits, returning=self.splits.returning,
                                              read=read)

    def finish(self) -> tuple[Tensor, ...]:
        """Wait for the exchange and return the tensors received."""
        received = unpack(self.transport.finish(self.receiving), self.like)
        self.sending = self.receiving = None
        return received


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """Pack tensors into one message: a single tensor as it is, several as uint8 [R, bytes of their rows]."""
    if len(tensors) == 1:
        return tensors[0].contiguous()
    rows = (_dense(tensor.reshape(tensor.shape[0], prod(tensor.shape[1:]))) for tensor in tensors)
    return torch.cat([rows_RW.view(torch.uint8) for rows_RW in rows], dim=1)


def unpack(message: Tensor, like: list[tuple[torch.dtype, torch.Size]]) -> tuple[Tensor, ...]:
    """Unpack the tensors of a message, by their dtypes and row shapes."""
    if len(like) == 1:
        return (message,)
    widths = [prod(shape) * dtype.itemsize for dtype, shape in like]
    parts = message.split(widths, dim=1)
    # Copies instead of views, which may begin at an address that is not aligned for their dtype.
    copies = (part.clone(memory_format=torch.contiguous_format) for part in parts)
    return tuple(part.view(dtype).view(message.shape[0], *shape)
                 for part, (dtype, shape) in zip(copies, like))


def _dense(rows_RW: Tensor) -> Tensor:
    """Rows with stride 1, copied if need be. torch calls a single row contiguous whatever its stride."""
    if rows_RW.is_contiguous() and rows_RW.stride(1) == 1:
        return rows_RW
    return torch.empty_like(rows_RW, memory_format=torch.contiguous_format).copy_(rows_RW)


class _Post(torch.autograd.Function):
    """Start the exchange. Its outputs are placeholders for the rows under way: only `_Wait` may use them."""

    @staticmethod
    def forward(ctx, state, *tensors):
        ctx.state = state
        state.start(tensors, state.splits, read=state.read)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx, *grads):                           # placeholders: the gradients are under way
        back = iter(ctx.state.finish())
        return None, *(next(back) if floating else None for floating in ctx.state.floating)


class _Wait(torch.autograd.Function):
    """Finish the exchange. Its backward starts the reverse exchange."""

    @staticmethod
    def forward(ctx, state, *posted):
        ctx.state, ctx.rows = state, posted[0].shape[0]
        return state.finish()

    @staticmethod
    def backward(ctx, *grads):
        # Integers have no gradient.
        back = [grad if floating else None for grad, floating in zip(grads, ctx.state.floating)]
        ctx.state.start([grad for grad in back if grad is not None], ctx.state.splits.reversed())
        return None, *(None if grad is None else grad.new_empty(1).expand(ctx.rows, *grad.shape[1:])
                       for grad in back)
