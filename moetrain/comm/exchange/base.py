"""Interface of the exchange backends: rows go to positions on the `ep` axis and come back.

No backend knows what an expert is. `post` starts an exchange and returns a handle; `handle.wait()` returns
the received rows. Both are differentiable: the backward of an exchange is the exchange with sent and received
rows swapped. Every rank takes part in it, also one that sends and receives nothing.

Shapes: P positions, C exchanges that are planned together, n numbers.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moetrain.ops.host_read import read_host

Counts = Sequence[Sequence[int]]         # one row for each exchange


class BackendPlan(Protocol):
    """What a backend needs to know of an exchange besides how many rows travel."""

    def reversed(self) -> "BackendPlan": ...


class Splits(NamedTuple):
    """Rows that this rank sends to and receives from each position, on the host.

    Attributes:
        sent: rows to each position.
        received: rows from each position.
        backend_plan: further numbers that the backend needs.
        returning: whether this is the way back of what was dispatched.
    """

    sent: tuple[int, ...]
    received: tuple[int, ...]
    backend_plan: BackendPlan | None = None
    returning: bool = False

    def reversed(self) -> "Splits":
        return Splits(self.received, self.sent, self.backend_plan and self.backend_plan.reversed(),
                      not self.returning)


class Handle(Protocol):
    """Exchange under way: a NamedTuple of tensors, since FSDP2 looks for them in what a module returns."""

    def wait(self) -> tuple[Tensor, ...]: ...


class Exchange(Protocol):
    """Exchange of rows between the positions of the `ep` axis, for one layer."""

    positions: int
    position: int                # of this rank

    def counts(self, sent_P: Tensor) -> Tensor:
        """Exchange integers [positions, n]: row s of the result comes from position s. Waits."""
        ...

    def announce(self, sent_CP: Tensor, received_CP: Tensor) -> Tensor:
        """Compute what the host must know of exchanges to come, besides their counts.

        May be collective. Does not wait.

        Args:
            sent_CP: int64 [C, P], rows to every position.
            received_CP: int64 [C, P], rows from every position.

        Returns:
            int64 [C, n], on the device.
        """
        ...

    def splits(self, sent: Counts, received: Counts, announced: Counts) -> list[Splits]:
        """Make the splits of exchanges, once the host knows the numbers. Not collective.

        Args:
            sent: rows to every position, for each exchange.
            received: rows from every position, for each exchange.
            announced: what `announce` has computed, for each exchange.
        """
        ...

    def post(self, tensors: tuple[Tensor, ...], splits: Splits, *, read: bool = True) -> Handle:
        """Start sending the rows of all tensors together.

        Args:
            tensors: rows ordered by destination. The tensors have one first dim and may differ in width and
                dtype; integers have no gradient.
            splits: rows to and from each position.
            read: whether backward reads what arrives. What it does not read is not kept by activation
                checkpointing, nor sent again.

        Returns:
            A handle whose `wait` returns the rows received, ordered by source.
        """
        ...


def nothing_announced(sent_CP: Tensor) -> Tensor:
    """Announce nothing, int64 [C, 0]: where rows travel directly, their counts are enough."""
    return sent_CP.new_empty(len(sent_CP), 0)


def plain_splits(sent: Counts, received: Counts) -> list[Splits]:
    """Splits of exchanges whose rows travel directly."""
    return [Splits(tuple(there), tuple(here)) for there, here in zip(sent, received, strict=True)]


def read_splits(exchange: Exchange, sent_CP: Tensor, received_CP: Tensor,
                besides_Cn: Tensor) -> tuple[list[Splits], list[list[int]]]:
    """Read the splits of exchanges to come, and other numbers, from the device. The host waits here, once.

    Args:
        exchange: the exchange that is to carry the rows.
        sent_CP: int64 [C, P], rows to every position.
        received_CP: int64 [C, P], rows from every position.
        besides_Cn: int64 [C, n], other numbers that the host needs.

    Returns:
        Splits of each exchange, and the rows of `besides_Cn`.
    """
    parts = [sent_CP, received_CP, exchange.announce(sent_CP, received_CP), besides_Cn]
    numbers = read_host(torch.cat(parts, dim=1)).split([part.shape[1] for part in parts], dim=1)
    *known, besides = (part.tolist() for part in numbers)
    return exchange.splits(*known), besides
