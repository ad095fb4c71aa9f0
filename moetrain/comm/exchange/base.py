"""The interface of a wire: rows go to positions on the `ep` axis and come back. No wire knows what an expert is.

`post` starts an exchange and returns a handle; `handle.wait()` gives the received rows. Both are differentiable: the
backward of an exchange is the exchange with the splits turned round, and it is issued by every rank, also by one that
sends and receives nothing.
"""

from typing import NamedTuple, Protocol

from torch import Tensor


class Splits(NamedTuple):
    """Rows this rank sends to and receives from each position, on the host."""

    sent: tuple[int, ...]
    received: tuple[int, ...]

    def reversed(self) -> "Splits":
        return Splits(self.received, self.sent)


class Handle(Protocol):
    """A NamedTuple with its tensors in sight: FSDP2 looks for them in what leaves a module."""

    def wait(self) -> tuple[Tensor, ...]: ...


class Exchange(Protocol):
    positions: int
    position: int                # of this rank

    def counts(self, sent_P: Tensor) -> Tensor:
        """Swap blocks of integers [positions, n]: row s of the result came from position s. Waits."""
        ...

    def post(self, tensors: tuple[Tensor, ...], splits: Splits, *, read: bool = True) -> Handle:
        """Start sending the rows of all tensors together, ordered by destination; the handle gives the rows received,
        ordered by source. The tensors have one first dim and may differ in width and dtype; integers have no gradient.

        read: whether backward reads what arrives. What it does not is not kept by activation checkpointing, nor sent again.
        """
        ...
