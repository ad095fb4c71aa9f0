"""Memory that the positions of a group write into directly, with signals: what the peer wire is made of.

Every position has a few receive *areas*, which all others map, and a pad of signals, one number for every kind and every
peer. A signal is an *epoch*, which only grows: whoever puts one has written, or read, everything before it.

    HostAreas        areas are ordinary memory that several threads or processes map; pads are polled
    SymmetricAreas   areas are torch symmetric memory on GPUs, copies are the copy engine's, waiting is done by the GPU.
                     It has never run: unverified

`shared_files` gives host areas to the processes of one machine. (Ordering: a position writes rows before it writes the epoch, and
x86 and the GIL keep stores in order; other processors would need a fence.)

Shapes: P positions.
"""

import os
import secrets
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.comm.mesh import Group

POLL_S = 20e-6


class Areas(Protocol):
    position: int
    positions: int

    def area(self, position: int, number: int) -> Tensor:
        """A position's receive area, uint8, as it is mapped here."""
        ...

    def grow(self, number: int, size: int) -> None:
        """Make an area at least so large, at all positions. Collective; what lay in it is gone."""
        ...

    def put(self, position: int, kind: int, epoch: int) -> None:
        """Tell a position that this one is done with an epoch."""
        ...

    def wait(self, position: int, kind: int, epoch: int, limit_s: float) -> None:
        """Until a position has put that epoch or a later one. TimeoutError where it can be raised, else a trap."""
        ...

    def leaving(self, message: Tensor) -> AbstractContextManager: ...        # around what sends it
    def arriving(self) -> AbstractContextManager: ...            # around what receives
    def landed(self) -> None: ...                                # before what was received is read


class HostAreas:
    """share: allocates so many bytes at every position and gives all of them, as mapped here. Collective."""

    def __init__(self, position: int, positions: int, numbers: int, kinds: int, share: Callable[[int], list[Tensor]]) -> None:
        self.position, self.positions, self.share = position, positions, share
        self.pads = [pad.view(torch.int64).view(kinds, positions) for pad in share(8 * kinds * positions)]
        self.areas: list[list[Tensor]] = [[torch.empty(0, dtype=torch.uint8)] * positions for _ in range(numbers)]
        self.seen = self.pads[position].numpy()              # plain loads, without torch's overhead

    def area(self, position: int, number: int) -> Tensor:
        return self.areas[number][position]

    def grow(self, number: int, size: int) -> None:
        if len(self.areas[number][self.position]) < size:
            self.areas[number] = self.share(1 << (size - 1).bit_length())

    def put(self, position: int, kind: int, epoch: int) -> None:
        self.pads[position][kind, self.position] = epoch

    def wait(self, position: int, kind: int, epoch: int, limit_s: float) -> None:
        until = time.monotonic() + limit_s
        while self.seen[kind, position] < epoch:
            if time.monotonic() > until:
                raise TimeoutError
            time.sleep(POLL_S)

    def leaving(self, message: Tensor) -> AbstractContextManager:
        return nullcontext()

    def arriving(self) -> AbstractContextManager:
        return nullcontext()

    def landed(self) -> None:
        pass


def shared_files(group: Group) -> Callable[[int], list[Tensor]]:
    """Memory of processes on one machine, through files that have no name any more once all have opened them. Collective."""
    folder = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())

    def share(size: int) -> list[Tensor]:
        token = [f"moetrain-{os.getpid()}-{secrets.token_hex(8)}"]
        dist.broadcast_object_list(token, src=group.ranks[0], group=group.process_group)
        paths = [folder / f"{token[0]}-{position}" for position in range(group.size)]
        mine = paths[group.position]
        with mine.open("xb") as file:
            file.truncate(size)
        try:
            dist.barrier(group.process_group)                # all files are there
            mapped = [torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8) for path in paths]
            dist.barrier(group.process_group)                # all have opened them
        finally:
            mine.unlink(missing_ok=True)
        return mapped

    return share


class SymmetricAreas:
    """Areas on GPUs of one node by torch symmetric memory. Unverified: it has never run.

    A signal of torch is a place that is 0 or 1: putting waits for 0 and sets 1, waiting waits for 1 and sets 0, both with a limit that
    traps. The protocol strictly alternates on every (kind, parity, pair), so a place for each stands for its epochs.
    """

    def __init__(self, group: Group, numbers: int, kinds: int, limit_s: float, device: torch.device) -> None:
        import torch.distributed._symmetric_memory as symmetric

        self.position, self.positions, self.group, self.device = group.position, group.size, group, device
        self.limit_ms, self._symmetric = int(limit_s * 1e3), symmetric
        self.areas: list[tuple[Tensor, object]] = [(torch.empty(0, dtype=torch.uint8, device=device), None)] * numbers
        self.pads = self._share(64)
        self.out, self.back = torch.cuda.Stream(device, priority=-1), torch.cuda.Stream(device, priority=-1)

    def area(self, position: int, number: int) -> Tensor:
        own, handle = self.areas[number]
        return own if position == self.position else handle.get_buffer(position, (len(own),), torch.uint8)

    def grow(self, number: int, size: int) -> None:
        if len(self.areas[number][0]) < size:
            torch.cuda.synchronize(self.device)              # rare: sizes double
            self.areas[number] = self._share(1 << (size - 1).bit_length())

    def put(self, position: int, kind: int, epoch: int) -> None:
        self.pads[1].put_signal(position, channel=2 * kind + epoch % 2, timeout_ms=self.limit_ms)

    def wait(self, position: int, kind: int, epoch: int, limit_s: float) -> None:
        self.pads[1].wait_signal(position, channel=2 * kind + epoch % 2, timeout_ms=int(limit_s * 1e3))

    def leaving(self, message: Tensor) -> AbstractContextManager:
        self.out.wait_stream(torch.cuda.current_stream(self.device))
        message.record_stream(self.out)                      # its memory is not given away before it has been copied
        return torch.cuda.stream(self.out)

    def arriving(self) -> AbstractContextManager:
        self.back.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self.back)

    def landed(self) -> None:
        torch.cuda.current_stream(self.device).wait_stream(self.back)

    def _share(self, size: int) -> tuple[Tensor, object]:
        own = self._symmetric.empty(size, dtype=torch.uint8, device=self.device)
        return own, self._symmetric.rendezvous(own, self.group.process_group.group_name)
