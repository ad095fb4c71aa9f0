"""Exchange backend over torch's all-to-all with splits on the device. Unverified: it has never run here.

It calls `torch.ops.symm_mem.all_to_all_vdev`, over NVSHMEM. Messages are copied into symmetric memory and out
of it. Like those of the peer exchange, buffers are double-buffered in each direction: none is reused before
both sides have finished another exchange, which every exchange with all positions ensures.

Activation checkpointing sees no operator here: what runs again in backward sends its rows again, on all ranks
alike.

Shapes: P positions, C exchanges that are planned together.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.comm.exchange.async_exchange import exchange_async
from moetrain.comm.exchange.base import Counts, Exchange, Handle, Splits
from moetrain.ops.pinned import to_device


class SymmetricWorkspace:
    """Symmetric memory and the stream of a group, shared by all layers."""

    def __init__(self, process_group: dist.ProcessGroup, positions: int, device: torch.device) -> None:
        import torch.distributed._symmetric_memory as symmetric

        symmetric.set_backend("NVSHMEM")
        self.symmetric, self.process_group = symmetric, process_group
        self.device, self.positions = device, positions
        self.stream = torch.cuda.Stream(device, priority=-1)
        self.splits = [self._share(positions, torch.int64) for _ in range(4)]
        self.arrived = [self._share(2 * positions, torch.int64).view(2, positions) for _ in range(4)]
        empty = torch.empty(0, device=device)
        self.buffers: list[tuple[Tensor, Tensor]] = [(empty, empty)] * 4         # for sending, for receiving
        self.begun = [0, 0]

    def send(self, message: Tensor, splits: Splits, max_rows: int, channel: int) -> Tensor:
        """Start an exchange and return the rows received, to be read after the workspace's stream.

        Args:
            message: [R, …], rows ordered by destination.
            splits: rows to and from each position.
            max_rows: largest number of rows that any position sends or receives.
            channel: 0 there, 1 back.
        """
        row = message.shape[1:].numel() * message.dtype.itemsize
        self.begun[channel] += 1
        number = 2 * channel + self.begun[channel] % 2
        if len(self.buffers[number][0]) < max_rows * row:
            torch.cuda.synchronize(self.device)
            size = 1 << (max_rows * row - 1).bit_length()
            self.buffers[number] = self._share(size, torch.uint8), self._share(size, torch.uint8)
        bits = message.new_empty(0, row, dtype=torch.uint8)
        if message.numel():
            bits = message.reshape(len(message), -1).view(torch.uint8)
        sending, receiving = (buffer[:len(buffer) // row * row].view(-1, row)
                              for buffer in self.buffers[number])
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            sending[:len(bits)].copy_(bits)
            self.splits[number].copy_(to_device(torch.tensor(splits.sent), self.device))
            torch.ops.symm_mem.all_to_all_vdev(sending, receiving, self.splits[number], self.arrived[number],
                                               self.process_group.group_name)
            out = receiving[:sum(splits.received)].clone().view(message.dtype).view(-1, *message.shape[1:])
        message.record_stream(self.stream)
        return out

    def _share(self, size: int, dtype: torch.dtype) -> Tensor:
        memory = self.symmetric.empty(size, dtype=dtype, device=self.device)
        self.symmetric.rendezvous(memory, self.process_group.group_name)
        return memory


class VdevExchange:
    """Exchange of one layer over a symmetric workspace.

    Args:
        flat: exchanges counts, and the largest number of rows of any position.
        workspace: symmetric memory, shared by all layers.
    """

    def __init__(self, flat: Exchange, workspace: SymmetricWorkspace) -> None:
        self.flat, self.workspace = flat, workspace
        self.positions, self.position = flat.positions, flat.position

    def counts(self, sent_P: Tensor) -> Tensor:
        return self.flat.counts(sent_P)

    def announce(self, sent_CP: Tensor, received_CP: Tensor) -> Tensor:
        own_C = sent_CP.sum(1).maximum(received_CP.sum(1))
        return self.flat.counts(own_C.expand(self.positions, -1).contiguous()).amax(0)[:, None]

    def splits(self, sent: Counts, received: Counts, announced: Counts) -> list[Splits]:
        return [Splits(tuple(there), tuple(here), MaxRows(max_rows))
                for there, here, (max_rows,) in zip(sent, received, announced, strict=True)]

    def post(self, tensors: tuple[Tensor, ...], splits: Splits, *, read: bool = True) -> Handle:
        return exchange_async(self, tensors, splits, read)

    def start(self, message: Tensor, splits: Splits, *, returning: bool, read: bool) -> Tensor:
        assert isinstance(splits.backend_plan, MaxRows)
        return self.workspace.send(message, splits, splits.backend_plan, int(returning))

    def finish(self, message: Tensor) -> Tensor:
        torch.cuda.current_stream(self.workspace.device).wait_stream(self.workspace.stream)
        message.record_stream(torch.cuda.current_stream(self.workspace.device))
        return message


class MaxRows(int):
    """Largest number of rows that any position sends or receives, there or back."""

    def reversed(self) -> "MaxRows":
        return self
