"""Host tensors on a device without a wait: from pageable memory CUDA copies only once the stream has come that far.

    to_device       one tensor
    DeviceTables    many small tables of integers, in one copy
"""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. What is on the host goes through pinned memory, and the host goes on at once."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class DeviceTables:
    """Small int64 tables of the host that go to a device together. A context manager.

    `put` gives a table on the device, to be read once the block has ended: that is when a buffer of pinned memory is copied
    with all that has been put. A copy a table would be several launches for every layer at each new plan.
    """

    ROOM = 1 << 14               # numbers of a buffer; there are more buffers when one is full

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: list[tuple[Tensor, Tensor]] = []      # on the host and on the device
        self._free = 0                                       # numbers of the last one

    def put(self, table: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return table.to(self.device)
        if not self._buffers or table.numel() > self._free:
            host = torch.empty(max(table.numel(), self.ROOM), dtype=torch.int64, device="cpu", pin_memory=True)
            self._buffers.append((host, torch.empty_like(host, device=self.device)))
            self._free = host.numel()
        begin = self._buffers[-1][0].numel() - self._free
        host, there = (buffer[begin:begin + table.numel()].view(table.shape) for buffer in self._buffers[-1])
        self._free -= table.numel()
        host.copy_(table)
        return there

    def __enter__(self) -> "DeviceTables":
        return self

    def __exit__(self, *error: object) -> None:
        for host, there in self._buffers:
            there.copy_(host, non_blocking=True)
