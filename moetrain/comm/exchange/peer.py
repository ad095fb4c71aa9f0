"""Peer exchange: rows are written directly into the memory of their destination. Inside a node.

An exchange is an *epoch* of its channel; dispatch and combine have a channel each. Buffers are
double-buffered by the parity of the epoch:

    send      wait until the destination is done with the epoch before last; copy its rows to their place in
              its buffer of this parity; put `ready`. One destination after the other, or all at once
              (`parallel.exchange=peer_push`)
    receive   wait for `ready` of every source; copy the rows out; put `free`

Where a source's rows begin in the buffer is known before (`announce`): every position tells the others where
their rows go and how many there are in all, for both directions. All positions then know the largest of these
totals, and so make buffers larger at the same moment.

Two exchanges may be under way on a channel, but not three: the third would wait for what its own position has
not taken yet. Overlap in chunks (moe/overlap.py) needs no more. Waiting has a time limit. The error names the
rank that did not come, the router and the epoch. There is no barrier, except where buffers grow.

Activation checkpointing sees the exchange as an operator (`peer_start`), whose result is kept instead of
fetched again.

Shapes: P positions, C exchanges that are planned together, N rows, B bytes of a row.
"""

from collections.abc import Sequence
from itertools import accumulate, count
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from moetrain.comm.exchange.async_exchange import exchange_async
from moetrain.comm.exchange.base import Counts, Exchange, Handle, Splits
from moetrain.comm.exchange.shared_buffers import SharedBuffers
from moetrain.errors import PeerError
from moetrain.ops.extension import define
from moetrain.ops.peer_memory import SignalTimeout, copy_rows, push_rows

CHANNELS = ("dispatch", "combine")
READY, FREE = 0, 1
NUM_BUFFERS, NUM_SIGNALS = 2 * len(CHANNELS), 2 * len(CHANNELS)


class RowOffsets(NamedTuple):
    """Places of rows in the buffers of other positions.

    Attributes:
        there: where the rows sent begin at each destination.
        back: where the rows that come back begin at each source.
        max_rows_there: largest number of rows that any position receives on the way there.
        max_rows_back: the same for the way back.
    """

    there: tuple[int, ...]
    back: tuple[int, ...]
    max_rows_there: int
    max_rows_back: int

    def reversed(self) -> "RowOffsets":
        return RowOffsets(self.back, self.there, self.max_rows_back, self.max_rows_there)


class PeerChannels:
    """Buffers of a group and the epochs of their channels, shared by all layers.

    Args:
        buffers: receive buffers and signals.
        limit_s: seconds to wait for another position.
        push: write rows to all destinations at once, by one kernel on a GPU. Otherwise they are copied to one
            destination after the other, which the copy engine does, without multiprocessors.
    """

    def __init__(self, buffers: SharedBuffers, limit_s: float, *, push: bool = False) -> None:
        self.buffers, self.limit_s, self.push = buffers, limit_s, push
        self.begun, self.taken = [0] * len(CHANNELS), [0] * len(CHANNELS)
        # Every position begins with another destination, so that not all write to the same one.
        turn = [(buffers.position + step) % buffers.positions for step in range(buffers.positions)]
        self.send_groups = [sorted(turn)] if push else [[to] for to in turn]

    def send(self, message: Tensor, sent: Sequence[int], there: Sequence[int], max_rows: int, channel: int,
             router: str) -> int:
        """Start an exchange.

        Args:
            message: [N, …], rows ordered by destination.
            sent: rows to each position.
            there: where they begin in the buffer of each position.
            max_rows: largest number of rows that any position receives.
            channel: index in CHANNELS.
            router: router of the layer, for errors.

        Returns:
            The epoch of the exchange.
        """
        self.begun[channel] += 1
        epoch, buffers, row = self.begun[channel], self.buffers, _row_bytes(message)
        under_way = epoch - self.taken[channel]
        assert under_way <= 2, f"{under_way} exchanges of {router} under way on a channel"
        buffer = 2 * channel + epoch % 2
        buffers.grow(buffer, max_rows * row)
        begins = list(accumulate(sent, initial=0))
        with buffers.on_send_stream(message):
            rows_NB = _as_bytes(message, row)
            for to in self.send_groups:
                if epoch > 2:
                    self._wait(to, channel, FREE, epoch - 2, router)
                part = (rows_NB[begins[to[0]]:begins[to[-1] + 1]], [buffers.buffer(p, buffer) for p in to],
                        [sent[p] for p in to], [there[p] for p in to])
                if self.push:
                    push_rows(*part, first=buffers.position)
                else:
                    copy_rows(*part)
                buffers.put(to, 2 * channel + READY, epoch)
        return epoch

    @torch.no_grad()
    def receive(self, out: Tensor, channel: int, epoch: int, router: str) -> None:
        """Copy the rows of an exchange into `out` once they have arrived; a channel's exchanges in order."""
        buffers, everyone = self.buffers, range(self.buffers.positions)
        assert epoch == self.taken[channel] + 1, (epoch, self.taken)
        with buffers.on_receive_stream():
            self._wait(everyone, channel, READY, epoch, router)
            if out.numel():
                rows = out.view(-1).view(torch.uint8)
                rows.copy_(buffers.buffer(buffers.position, 2 * channel + epoch % 2)[:len(rows)])
            buffers.put(everyone, 2 * channel + FREE, epoch)
        buffers.wait_received()
        self.taken[channel] = epoch

    def _wait(self, positions: Sequence[int], channel: int, kind: int, epoch: int, router: str) -> None:
        """Wait for signals of positions; raise PeerError with the rank of one that does not come in time."""
        where = f"{CHANNELS[channel]} {epoch} of this run, in {router}"
        try:
            self.buffers.wait(positions, 2 * channel + kind, epoch, self.limit_s,
                            f"{'its rows' if kind == READY else 'that it takes rows'}, {where}")
        except SignalTimeout as late:
            rank, other = self.buffers.ranks[self.buffers.position], self.buffers.ranks[positions[late.index]]
            if kind == READY:
                raise PeerError(3, f"rank {rank} waited {self.limit_s:g} s for the rows of rank {other}",
                                where=where, why="that rank is gone, or hangs before it sends them",
                                next=f"see log/rank-{other}.log; the same command resumes. run.timeout_s "
                                     "sets the wait") from None
            raise PeerError(4, f"rank {rank} waited {self.limit_s:g} s until rank {other} had taken rows",
                            where=where,
                            why="that rank is gone, or hangs before it takes them; its memory holds two "
                                "exchanges",
                            next=f"see log/rank-{other}.log; the same command resumes. run.timeout_s sets "
                                 "the wait") from None


class PeerExchange:
    """Peer exchange of one layer.

    Args:
        flat: exchanges counts, which are small.
        peers: buffers and channels, shared by all layers.
        name: name of the router.
    """

    def __init__(self, flat: Exchange, peers: PeerChannels, name: str) -> None:
        self.flat, self.peers, self.name = flat, peers, name
        self.key = f"{name} {next(_NUMBERS)}"
        self.positions, self.position = flat.positions, flat.position
        # (channel, epoch) by the address that rows will be copied to.
        self.on_way: dict[int, tuple[int, int]] = {}
        _EXCHANGES[self.key] = self

    def counts(self, sent_P: Tensor) -> Tensor:
        return self.flat.counts(sent_P)

    def announce(self, sent_CP: Tensor, received_CP: Tensor) -> Tensor:
        """Tell every position where its rows begin here, where those that come back begin, and the totals."""
        rows_2CP = torch.stack([received_CP, sent_CP])
        begins_2CP, totals_2C1 = rows_2CP.cumsum(2) - rows_2CP, rows_2CP.sum(2, keepdim=True)
        told_P4C = torch.cat([begins_2CP, totals_2C1.expand_as(rows_2CP)]).permute(2, 0, 1)
        heard_P4C = self.flat.counts(told_P4C.flatten(1).contiguous()).view(told_P4C.shape)
        return heard_P4C.permute(2, 1, 0).flatten(1)

    def splits(self, sent: Counts, received: Counts, announced: Counts) -> list[Splits]:
        found = []
        for ours, theirs, heard in zip(sent, received, announced, strict=True):
            kinds = range(0, len(heard), self.positions)
            there, back, total, total_back = (tuple(heard[begin:begin + self.positions]) for begin in kinds)
            offsets = RowOffsets(there, back, max(total), max(total_back))
            found.append(Splits(tuple(ours), tuple(theirs), offsets))
        return found

    def post(self, tensors: tuple[Tensor, ...], splits: Splits, *, read: bool = True) -> Handle:
        return exchange_async(self, tensors, splits, read)

    def start(self, message: Tensor, splits: Splits, *, returning: bool, read: bool) -> Tensor:
        begin = _peer_start if read else _peer_start_unread
        offsets = splits.backend_plan
        assert isinstance(offsets, RowOffsets)
        return begin(message, list(splits.received), list(splits.sent), list(offsets.there),
                     offsets.max_rows_there, int(returning), self.key)

    def finish(self, message: Tensor) -> Tensor:
        """Receive the rows of an exchange; one that activation checkpointing kept is complete already."""
        found = self.on_way.pop(_address(message), None)
        if found is not None:
            with torch.autograd._unsafe_preserve_version_counter(message):
                self.peers.receive(message, *found, self.name)
        return message

    def launch(self, message: Tensor, received: Sequence[int], sent: Sequence[int], there: Sequence[int],
               max_rows: int, channel: int) -> Tensor:
        """Start an exchange and return the memory that its rows will come to; the body of the operator."""
        rows = sum(received)
        memory = message.new_empty(max(1, rows), *message.shape[1:])   # at least a row, so it has an address
        epoch = self.peers.send(message, sent, there, max_rows, channel, self.name)
        self.on_way[_address(memory)] = channel, epoch
        return memory[:rows]


_NUMBERS = count()
_EXCHANGES: WeakValueDictionary[str, PeerExchange] = WeakValueDictionary()
_SCHEMA = ("(Tensor message, SymInt[] received, SymInt[] sent, SymInt[] there, SymInt max_rows, "
           "SymInt channel, str exchange) -> Tensor")


def _start(message: Tensor, received: list[int], sent: list[int], there: list[int], max_rows: int,
           channel: int, exchange: str) -> Tensor:
    return _EXCHANGES[exchange].launch(message, received, sent, there, max_rows, channel)


def _fake(message: Tensor, received: list[int], *_) -> Tensor:
    return message.new_empty(sum(received), *message.shape[1:])


_peer_start = define(f"peer_start{_SCHEMA}", reference=_start, fake=_fake)
# For rows that backward never reads, as in flat.py.
_peer_start_unread = define(f"peer_start_unread{_SCHEMA}", reference=_start, fake=_fake)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _row_bytes(message: Tensor) -> int:
    return message.shape[1:].numel() * message.dtype.itemsize


def _as_bytes(message: Tensor, row: int) -> Tensor:
    """View rows as bytes, uint8 [N, B]."""
    if not message.numel():
        return message.new_empty(len(message), row, dtype=torch.uint8)
    return message.view(-1).view(torch.uint8).view(-1, row)
