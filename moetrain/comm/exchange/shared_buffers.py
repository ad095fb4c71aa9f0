"""Shared memory with signals: buffers that the positions of a group write into directly.

The peer exchange (comm/exchange/peer.py) is made of these. Every position has a few receive *buffers*, which
all other positions map, and a pad of signals, one number for every kind and every peer. A signal is an
*epoch*, which only grows: the position that puts it has written, or read, everything up to that epoch.

The memory comes from a function `share`: `shared_files` for the processes of one machine, `symmetric_memory`
for its GPUs (unverified: it has never run). On a GPU sending and receiving have streams of their own. With
the kernels of ops/peer_memory.py the GPU waits for signals, without them the host does.

Memory order: a position writes rows before it writes the epoch. On CPUs x86 and Python's GIL keep stores in
order; other processors would need a fence. On GPUs signals are released and acquired at system scope
(ops/peer_memory.py).
"""

import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.comm.agreement import all_or_none
from moetrain.comm.mesh import Group
from moetrain.errors import DiskError
from moetrain.files import create, reason
from moetrain.ops.peer_memory import await_signals, put_signals

Share = Callable[[int], list[Tensor]]


class SharedBuffers:
    """Receive buffers and signals of all positions, as they are mapped at this one. Collective to make.

    Args:
        position: this position.
        ranks: global rank of each position.
        numbers: number of buffers that every position has.
        kinds: kinds of signals.
        share: allocates so many bytes, all zero, at every position, and returns those of all positions as
            they are mapped here. Collective.
        device: where the buffers are.
    """

    def __init__(self, position: int, ranks: Sequence[int], numbers: int, kinds: int, share: Share,
                 device: torch.device) -> None:
        self.position, self.ranks, self.positions = position, tuple(ranks), len(ranks)
        self.share, self.device = share, device
        self.pads = [pad.view(torch.int64) for pad in share(8 * kinds * self.positions)]
        empty = torch.empty(0, dtype=torch.uint8, device=device)
        self.buffers = [[empty] * self.positions for _ in range(numbers)]
        self.streams = None
        if device.type == "cuda":
            self.streams = [torch.cuda.Stream(device, priority=-1) for _ in range(2)]

    def buffer(self, position: int, number: int) -> Tensor:
        """Receive buffer of a position, uint8, as it is mapped here."""
        return self.buffers[number][position]

    def grow(self, number: int, size: int) -> None:
        """Make a buffer at least so large at all positions, and lose its contents.

        Collective. Rare, because sizes double.
        """
        if len(self.buffers[number][self.position]) < size:
            for stream in self.streams or ():                # this position may still move rows
                stream.synchronize()
            self.buffers[number] = self.share(1 << (size - 1).bit_length())

    def put(self, positions: Sequence[int], kind: int, epoch: int) -> None:
        """Signal positions that this one is done with an epoch."""
        slot = kind * self.positions + self.position
        put_signals([self.pads[position] for position in positions], slot, epoch)

    def wait(self, positions: Sequence[int], kind: int, epoch: int, limit_s: float, what: str) -> None:
        """Wait until all of these positions have put that epoch or a later one.

        Raises SignalTimeout after `limit_s` seconds; on a GPU the kernel traps instead (ops/peer_memory.py).

        Args:
            positions: positions to wait for.
            kind: kind of the signal.
            epoch: epoch to wait for.
            limit_s: seconds to wait at most.
            what: what is waited for, for the message of an error.
        """
        slots = [kind * self.positions + position for position in positions]
        ranks = [*(self.ranks[position] for position in positions), self.ranks[self.position]]
        await_signals(self.pads[self.position], slots, epoch, limit_s, ranks, what)

    def on_send_stream(self, message: Tensor) -> AbstractContextManager:
        """Context in which a message is sent, after all that the current stream has computed."""
        if not self.streams:
            return nullcontext()
        self.streams[0].wait_stream(torch.cuda.current_stream(self.device))
        # The allocator then gives its memory to no other tensor before it has been copied.
        message.record_stream(self.streams[0])
        return torch.cuda.stream(self.streams[0])

    def on_receive_stream(self) -> AbstractContextManager:
        """Context in which rows are received, after all that the current stream has computed."""
        if not self.streams:
            return nullcontext()
        self.streams[1].wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self.streams[1])

    def wait_received(self) -> None:
        """Make the current stream wait for what was received, before it reads that."""
        if self.streams:
            torch.cuda.current_stream(self.device).wait_stream(self.streams[1])


def shared_files(group: Group) -> Share:
    """Share memory between processes of one machine, by files that are unlinked once all have mapped them."""
    folder = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())

    def share(size: int) -> list[Tensor]:
        token = [f"moetrain-{os.getpid()}-{secrets.token_hex(8)}"]
        dist.broadcast_object_list(token, src=group.ranks[0], group=group.process_group)
        paths = [folder / f"{token[0]}-{position}" for position in range(group.size)]
        mine = paths[group.position]
        try:
            all_or_none(group, lambda: _reserve(mine, size))         # after this all files exist
            mapped = [torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8) for path in paths]
            dist.barrier(group.process_group)                # after this all ranks have mapped them
        finally:
            mine.unlink(missing_ok=True)
        return mapped

    return share


def _reserve(path: Path, size: int) -> None:
    """Make a file and reserve its memory.

    A sparse file of that size would get its memory only when it is written to; where none is left, that ends
    in SIGBUS instead of an error.
    """
    try:
        with create(path) as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        free = shutil.disk_usage(path.parent).free
        raise DiskError(42, "there is no room for the memory that ranks share", where=str(path.parent),
                        why=f"{reason(error)}: parallel.exchange=peer needs {size:,} bytes for each rank of "
                            f"this machine, {free:,} are free now",
                        next="enlarge it (docker: --shm-size=16g), or parallel.exchange=flat") from error


def symmetric_memory(group: Group, device: torch.device) -> Share:
    """Share memory between the GPUs of one node, by torch symmetric memory. Unverified: it has never run."""
    import torch.distributed._symmetric_memory as symmetric

    def share(size: int) -> list[Tensor]:
        own = symmetric.empty(size, dtype=torch.uint8, device=device).zero_()
        torch.cuda.current_stream(device).synchronize()      # zeros are written before any peer can write
        assert group.process_group is not None
        handle = symmetric.rendezvous(own, group.process_group.group_name)
        return [own if position == group.position else handle.get_buffer(position, (size,), torch.uint8)
                for position in range(group.size)]

    return share
