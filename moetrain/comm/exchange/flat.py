"""Flat exchange: one uneven all-to-all by torch.distributed. The reference for all other backends."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.comm.exchange.async_exchange import ReadyRows, exchange_async
from moetrain.comm.exchange.base import Counts, Handle, Splits, nothing_announced, plain_splits
from moetrain.comm.mesh import Group
from moetrain.ops.extension import define


class FlatExchange:
    """All-to-all over one group. A group of one rank returns its own rows."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.positions, self.position = group.size, group.position

    def counts(self, sent_P: Tensor) -> Tensor:
        if self.group.process_group is None:
            return sent_P
        even = [len(sent_P) // self.positions] * self.positions
        return wait(post(sent_P, even, even, self.group.process_group))

    def announce(self, sent_CP: Tensor, received_CP: Tensor) -> Tensor:
        return nothing_announced(sent_CP)

    def splits(self, sent: Counts, received: Counts, announced: Counts) -> list[Splits]:
        return plain_splits(sent, received)

    def post(self, tensors: tuple[Tensor, ...], splits: Splits, *, read: bool = True) -> Handle:
        if self.group.process_group is None:
            return ReadyRows(tensors)
        return exchange_async(self, tensors, splits, read)

    def start(self, message: Tensor, splits: Splits, *, returning: bool, read: bool) -> Tensor:
        return post(message, splits.received, splits.sent, self.group.process_group, read=read)

    def finish(self, message: Tensor) -> Tensor:
        return wait(message)


def post(message: Tensor, received: Sequence[int], sent: Sequence[int], process_group: dist.ProcessGroup, *,
         read: bool = True) -> Tensor:
    """Start an all-to-all of rows.

    Args:
        message: [R, …], rows ordered by destination.
        received: rows from each position.
        sent: rows to each position.
        process_group: the ranks that take part.
        read: whether backward reads the result (`Exchange.post`).

    Returns:
        A plain tensor of the rows received, which may be read after `wait`.
    """
    exchange = torch.ops._c10d_functional.all_to_all_single if read else _all_to_all_unread
    return exchange(message, list(received), list(sent), process_group.group_name)


# The same op under another name, for rows that backward never reads: recomputation leaves it out.
_all_to_all_unread = define(
    "all_to_all_single_unread(Tensor message, SymInt[] received, SymInt[] sent, str group) -> Tensor",
    reference=lambda *arguments: torch.ops._c10d_functional.all_to_all_single(*arguments),
    fake=lambda message, received, sent, group: message.new_empty(sum(received), *message.shape[1:]),
)


def wait(message: Tensor) -> Tensor:
    """Wait for an all-to-all that `post` has started."""
    return torch.ops._c10d_functional.wait_tensor(message)
