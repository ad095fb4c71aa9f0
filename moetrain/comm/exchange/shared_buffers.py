"""Memory that the positions of a group write into directly, with signals: what the peer wire is made of.

Every position has a few receive *buffers*, which all others map, and a pad of signals, one number for every kind and every
peer. A signal is an *epoch*, which only grows: whoever puts one has written, or read, everything before it.

Where the memory comes from is a function `share`: `shared_files` for the processes of one machine, `symmetric_memory` for its
GPUs (which has never run: unverified). On a GPU sending and receiving have streams of their own; with kernels the GPU
waits, without them the host.

(Ordering: a position writes rows before it writes the epoch. On CPUs x86 and the GIL keep stores in order; other processors
would need a fence. On GPUs signals are released and acquired at system scope, ops/peer_memory.py.)
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
    """share: allocates so many bytes, zeros, at every position and gives all of them, as mapped here. Collective. numbers: of buffers;
    kinds: of signals; ranks: of the positions."""

    def __init__(self, position: int, ranks: Sequence[int], numbers: int, kinds: int, share: Share, device: torch.device) -> None:
        self.position, self.ranks, self.positions, self.share, self.device = position, tuple(ranks), len(ranks), share, device
        self.pads = [pad.view(torch.int64) for pad in share(8 * kinds * self.positions)]
        self.buffers = [[torch.empty(0, dtype=torch.uint8, device=device)] * self.positions for _ in range(numbers)]
        self.streams = [torch.cuda.Stream(device, priority=-1) for _ in range(2)] if device.type == "cuda" else None

    def buffer(self, position: int, number: int) -> Tensor:
        """A position's receive buffer, uint8, as it is mapped here."""
        return self.buffers[number][position]

    def grow(self, number: int, size: int) -> None:
        """ExchangeFactory an buffer at least so large, at all positions. Collective; what lay in it is gone. Rare: sizes double."""
        if len(self.buffers[number][self.position]) < size:
            for stream in self.streams or ():                # what this position still moves
                stream.synchronize()
            self.buffers[number] = self.share(1 << (size - 1).bit_length())

    def put(self, positions: Sequence[int], kind: int, epoch: int) -> None:
        """Tell positions that this one is done with an epoch."""
        put_signals([self.pads[position] for position in positions], kind * self.positions + self.position, epoch)

    def wait(self, positions: Sequence[int], kind: int, epoch: int, limit_s: float, what: str) -> None:
        """Until all of these have put that epoch or a later one. Raises SignalTimeout, or traps on a GPU (ops/peer_memory.py)."""
        await_signals(self.pads[self.position], [kind * self.positions + position for position in positions], epoch, limit_s,
                      [*(self.ranks[position] for position in positions), self.ranks[self.position]], what)

    def on_send_stream(self, message: Tensor) -> AbstractContextManager:
        """Round what sends it."""
        if not self.streams:
            return nullcontext()
        self.streams[0].wait_stream(torch.cuda.current_stream(self.device))
        message.record_stream(self.streams[0])               # its memory is not given away before it has been copied
        return torch.cuda.stream(self.streams[0])

    def on_receive_stream(self) -> AbstractContextManager:
        """Round what receives."""
        if not self.streams:
            return nullcontext()
        self.streams[1].wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self.streams[1])

    def wait_received(self) -> None:
        """Before what was received is read."""
        if self.streams:
            torch.cuda.current_stream(self.device).wait_stream(self.streams[1])


def shared_files(group: Group) -> Share:
    """Memory of processes on one machine, through files that have no name any more once all have opened them."""
    folder = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())

    def share(size: int) -> list[Tensor]:
        token = [f"moetrain-{os.getpid()}-{secrets.token_hex(8)}"]
        dist.broadcast_object_list(token, src=group.ranks[0], group=group.process_group)
        paths = [folder / f"{token[0]}-{position}" for position in range(group.size)]
        mine = paths[group.position]
        try:
            all_or_none(group, lambda: _reserve(mine, size))         # all files are there
            mapped = [torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8) for path in paths]
            dist.barrier(group.process_group)                # all have opened them
        finally:
            mine.unlink(missing_ok=True)
        return mapped

    return share


def _reserve(path: Path, size: int) -> None:
    """ExchangeFactory a file whose memory is there: that of one which merely has the size is asked for when it is touched, and where there is
    none left the answer is SIGBUS."""
    try:
        with create(path) as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        free = shutil.disk_usage(path.parent).free
        raise DiskError(42, "there is no room for the memory that ranks share", where=str(path.parent),
                        why=f"{reason(error)}: parallel.exchange=peer needs {size:,} bytes for each rank of this machine, {free:,} are "
                            f"free now", next="enlarge it (docker: --shm-size=16g), or parallel.exchange=flat") from error


def symmetric_memory(group: Group, device: torch.device) -> Share:
    """Memory of the GPUs of one node, by torch symmetric memory. Unverified: it has never run."""
    import torch.distributed._symmetric_memory as symmetric

    def share(size: int) -> list[Tensor]:
        own = symmetric.empty(size, dtype=torch.uint8, device=device).zero_()
        torch.cuda.current_stream(device).synchronize()      # zeros are there before any peer can write
        handle = symmetric.rendezvous(own, group.process_group.group_name)
        return [own if position == group.position else handle.get_buffer(position, (size,), torch.uint8)
                for position in range(group.size)]

    return share
