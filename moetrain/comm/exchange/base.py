"""The interface of a wire: rows go to positions on the `ep` axis and come back. No wire knows what an expert is.

`post` starts an exchange and returns a handle; `handle.wait()` gives the received rows. Both are differentiable: the
backward of an exchange is the exchange with the splits turned round, and it is issued by every rank, also by one that
sends and receives nothing.

Shapes: P positions, C exchanges that are prepared together.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moetrain.ops.host_read import read_host

Counts = Sequence[Sequence[int]]         # a line for each exchange


class BackendPlan(Protocol):
    """What a wire knows of an exchange besides how many rows travel."""

    def reversed(self) -> "BackendPlan": ...


class Splits(NamedTuple):
    """Rows this rank sends to and receives from each position, on the host."""

    sent: tuple[int, ...]
    received: tuple[int, ...]
    backend_plan: BackendPlan | None = None

    def reversed(self) -> "Splits":
        return Splits(self.received, self.sent, self.backend_plan and self.backend_plan.reversed())


class Handle(Protocol):
    """A NamedTuple with its tensors in sight: FSDP2 looks for them in what leaves a module."""

    def wait(self) -> tuple[Tensor, ...]: ...


class Exchange(Protocol):
    positions: int
    position: int                # of this rank

    def counts(self, sent_P: Tensor) -> Tensor:
        """Swap blocks of integers [positions, n]: row s of the result came from position s. Waits."""
        ...

    def announce(self, sent_CP: Tensor, received_CP: Tensor) -> Tensor:
        """What the host must know besides of exchanges to come, int64 [C, n] on the device. May be collective; does not wait.

        sent_CP, received_CP: int64, rows to and from every position.
        """
        ...

    def splits(self, sent: Counts, received: Counts, announced: Counts) -> list[Splits]:
        """Of these exchanges, once the host knows the numbers. Not collective."""
        ...

    def post(self, tensors: tuple[Tensor, ...], splits: Splits, *, read: bool = True) -> Handle:
        """Start sending the rows of all tensors together, ordered by destination; the handle gives the rows received,
        ordered by source. The tensors have one first dim and may differ in width and dtype; integers have no gradient.

        read: whether backward reads what arrives. What it does not is not kept by activation checkpointing, nor sent again.
        """
        ...


def nothing_announced(sent_CP: Tensor) -> Tensor:
    """Where rows travel straight, there is nothing more to know."""
    return sent_CP.new_empty(len(sent_CP), 0)


def plain_splits(sent: Counts, received: Counts) -> list[Splits]:
    return [Splits(tuple(there), tuple(here)) for there, here in zip(sent, received, strict=True)]


def read_splits(exchange: Exchange, sent_CP: Tensor, received_CP: Tensor,
                besides_Cn: Tensor) -> tuple[list[Splits], list[list[int]]]:
    """Splits of exchanges to come, and other numbers of the device that the host wants: here, once, it waits for them.

    Args:
        exchange: the wire that is to carry them.
        sent_CP: int64, rows to every position, a line for each exchange.
        received_CP: the same from every position.
        besides_Cn: int64, as many lines.
    """
    parts = [sent_CP, received_CP, exchange.announce(sent_CP, received_CP), besides_Cn]
    numbers = read_host(torch.cat(parts, dim=1)).split([part.shape[1] for part in parts], dim=1)
    *known, besides = (part.tolist() for part in numbers)
    return exchange.splits(*known), besides
