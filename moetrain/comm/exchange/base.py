"""The interface of a wire: rows go to positions on the `ep` axis and come back. No wire knows what an expert is.

`post` starts an exchange and returns a handle; `handle.wait()` gives the received rows. Both are differentiable: the
backward of an exchange is the exchange with the splits turned round, and it is issued by every rank, also by one that
sends and receives nothing.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor


class Way(Protocol):
    """What a wire knows of an exchange besides how many rows travel."""

    def reversed(self) -> "Way": ...


class Splits(NamedTuple):
    """Rows this rank sends to and receives from each position, on the host."""

    sent: tuple[int, ...]
    received: tuple[int, ...]
    way: Way | None = None

    def reversed(self) -> "Splits":
        return Splits(self.received, self.sent, self.way and self.way.reversed())


class Handle(Protocol):
    """A NamedTuple with its tensors in sight: FSDP2 looks for them in what leaves a module."""

    def wait(self) -> tuple[Tensor, ...]: ...


class Exchange(Protocol):
    positions: int
    position: int                # of this rank

    def counts(self, sent_P: Tensor) -> Tensor:
        """Swap blocks of integers [positions, n]: row s of the result came from position s. Waits."""
        ...

    def splits(self, sent: Sequence[Sequence[int]], received: Sequence[Sequence[int]]) -> list[Splits]:
        """Of several exchanges that are to come, from the rows to and from every position in each. May be collective; waits."""
        ...

    def post(self, tensors: tuple[Tensor, ...], splits: Splits, *, read: bool = True) -> Handle:
        """Start sending the rows of all tensors together, ordered by destination; the handle gives the rows received,
        ordered by source. The tensors have one first dim and may differ in width and dtype; integers have no gradient.

        read: whether backward reads what arrives. What it does not is not kept by activation checkpointing, nor sent again.
        """
        ...


def plain_splits(sent: Sequence[Sequence[int]], received: Sequence[Sequence[int]]) -> list[Splits]:
    """Where rows travel straight, there is nothing more to know."""
    return [Splits(tuple(there), tuple(here)) for there, here in zip(sent, received, strict=True)]
