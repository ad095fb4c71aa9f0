"""Copies from host to device that do not make the host wait.

    to_device       one tensor
    DeviceTables    many small tables of integers, in one copy

Both go through pinned memory. A copy from pageable memory makes the host wait until the stream has reached
it.
"""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor to a device. From the host to CUDA it goes through pinned memory, and nothing waits."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class DeviceTables:
    """Copy of many small int64 tables to a device at once. A context manager.

    `put` returns a table on the device, which holds its numbers only after the `with` block: at its end, the
    buffer of pinned memory with all tables is copied. One copy per table would be several launches for each
    layer at every new placement.

    Args:
        device: where the tables go.
    """

    ROOM = 1 << 14               # numbers in a buffer; a full buffer is followed by another

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: list[tuple[Tensor, Tensor]] = []      # on the host, and its copy on the device
        self._free = 0                                       # numbers of room in the last buffer

    def put(self, table: Tensor) -> Tensor:
        """Add a table of the host, int64 of any shape; return its place on the device."""
        if self.device.type != "cuda":
            return table.to(self.device)
        if not self._buffers or table.numel() > self._free:
            numbers = max(table.numel(), self.ROOM)
            host = torch.empty(numbers, dtype=torch.int64, device="cpu", pin_memory=True)
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
