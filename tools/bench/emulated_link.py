"""Emulated link of one process: an exchange backend whose messages arrive when they have had their time.

A message occupies the link for latency + bytes / rate, one message after the other, and is there when that
time is over. On a GPU the link is a stream that copies in pieces and idles in between, so that the schedule
runs under real products; that path has never run.
"""

import time

import torch
from torch import Tensor

from moetrain.comm.exchange.async_exchange import exchange_async
from moetrain.comm.exchange.base import Counts, Handle, Splits, nothing_announced, plain_splits

PIECES = 8                       # of a message that a GPU copies, with a pause after each


class Clock:
    """Processor time of this thread plus emulated waits, which take no time; other work does not show."""

    def __init__(self) -> None:
        self.waited = 0.0

    def now(self) -> float:
        return time.thread_time() + self.waited

    def wait_until(self, due: float) -> None:
        self.waited += max(0.0, due - self.now())


class WallClock(Clock):
    """Time on the wall; waits are slept."""

    def now(self) -> float:
        return time.perf_counter()

    def wait_until(self, due: float) -> None:
        time.sleep(max(0.0, due - self.now()))


class EmulatedLink:
    """Exchange backend of one process: what comes from a position is what goes there, a little later.

    Args:
        positions: number of positions; the process is position 0.
        rate: bytes per second.
        latency_s: seconds of a message that carries nothing.
        device: where the messages are.
        clock: measures and waits, on a CPU.
    """

    def __init__(self, positions: int, rate: float, latency_s: float, device: torch.device,
                 clock: Clock) -> None:
        self.positions, self.position = positions, 0
        self.rate, self.latency_s, self.device = rate, latency_s, device
        self.free, self.bytes, self.messages, self.clock = 0.0, 0, 0, clock
        self.due: dict[int, float] = {}
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def counts(self, sent_P: Tensor) -> Tensor:
        return sent_P.clone()

    def announce(self, sent_CP: Tensor, received_CP: Tensor) -> Tensor:
        return nothing_announced(sent_CP)

    def splits(self, sent: Counts, received: Counts, announced: Counts) -> list[Splits]:
        return plain_splits(sent, received)

    def post(self, tensors: tuple[Tensor, ...], splits: Splits, *, read: bool = True) -> Handle:
        return exchange_async(self, tensors, splits, read)

    def start(self, message: Tensor, splits: Splits, *, returning: bool, read: bool) -> Tensor:
        leaving = (len(message) - splits.sent[0]) * message.shape[1:].numel() * message.dtype.itemsize
        self.bytes, self.messages = self.bytes + leaving, self.messages + 1
        seconds = self.latency_s + leaving / self.rate
        if self.stream is not None:
            return self._on_stream(message, seconds)
        arriving = message.clone()
        self.free = max(self.free, self.clock.now()) + seconds
        self.due[id(arriving)] = self.free
        return arriving

    def finish(self, message: Tensor) -> Tensor:
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        else:
            self.clock.wait_until(self.due.pop(id(message)))
        return message

    def _on_stream(self, message: Tensor, seconds: float) -> Tensor:
        """Copy in pieces with pauses on a stream of its own. Unverified: it has never run."""
        cycles = int(seconds / PIECES * torch.cuda.get_device_properties(self.device).clock_rate * 1e3)
        arriving = torch.empty_like(message)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for to, piece in zip(arriving.chunk(PIECES), message.chunk(PIECES)):
                to.copy_(piece, non_blocking=True)
                torch.cuda._sleep(cycles)
        for tensor in (message, arriving):
            tensor.record_stream(self.stream)
        return arriving
