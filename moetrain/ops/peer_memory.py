"""Copies of rows into the memory of peers, and signals of their arrival, for the exchange backend `peer`.

    copy_rows       rows to the buffers of several positions, one copy for each
    push_rows       the same by one kernel
    put_signals     an epoch into the pads of several positions, visible after all that was written before it
    await_signals   wait until places of a pad hold that epoch or a later one; who is late is named

Buffers and pads are mapped here and lie at the peers: memory of this device, of others, or of other
processes. A pad is int64, and what is in it only grows. Without kernels `await_signals` looks at the pad from
the host. A kernel takes up to 64 positions.

Shapes: N rows, B bytes of a row, P positions written to.
"""

import time
from collections.abc import Sequence

from torch import Tensor

from moetrain.ops.extension import define, kernels_for

_POLL_S = 20e-6


class SignalTimeout(TimeoutError):
    """A signal did not come in time.

    Args:
        index: number of its place, among those that were awaited.
    """

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index


def copy_rows(rows_NB: Tensor, areas: Sequence[Tensor], sent: Sequence[int], there: Sequence[int]) -> None:
    """Copy rows to the buffers of several positions, one copy for each. A GPU's copy engine does it.

    Args:
        rows_NB: uint8 [N, B], ordered by destination.
        areas: uint8, the buffer of each destination.
        sent: number of rows for each destination.
        there: row of its buffer at which they begin.
    """
    width = rows_NB.shape[1]
    for area, rows, begin in zip(areas, rows_NB.split(list(sent)), there, strict=True):
        area[begin * width:(begin + len(rows)) * width].copy_(rows.flatten(), non_blocking=True)


def push_rows(rows_NB: Tensor, areas: Sequence[Tensor], sent: Sequence[int], there: Sequence[int],
              first: int = 0) -> None:
    """Copy rows to the buffers of several positions by one kernel. Without kernels, `copy_rows`.

    The kernel has a few blocks, which write to all destinations, each beginning with another one.

    Args:
        rows_NB: uint8 [N, B], ordered by destination.
        areas: uint8, the buffer of each destination.
        sent: number of rows for each destination.
        there: row of its buffer at which they begin.
        first: destination with which the first block begins.
    """
    (_push_rows if kernels_for(rows_NB) else _copies)(rows_NB, list(areas), list(sent), list(there), first)


def put_signals(pads: Sequence[Tensor], place: int, epoch: int) -> None:
    """Set pads[p][place] = epoch, after everything that this stream has written.

    Args:
        pads: int64, the pad of each position.
        place: index into every pad.
        epoch: number to store.
    """
    (_put_signals if kernels_for(pads[0]) else _put)(list(pads), place, epoch)


def await_signals(pad: Tensor, places: Sequence[int], epoch: int, limit_s: float, ranks: Sequence[int],
                  what: str) -> None:
    """Wait until pad[place] >= epoch at all places.

    Args:
        pad: int64, this position's pad.
        places: indices into the pad.
        epoch: number to wait for.
        limit_s: seconds after which waiting fails.
        ranks: rank that writes each place; last, the rank that waits.
        what: what is awaited, for the message.

    Raises:
        SignalTimeout: a signal is late. A kernel cannot raise: it prints who waited for whom and for what,
            and traps, which ends the process.
    """
    if kernels_for(pad):
        _await_signals(pad, list(places), epoch, int(limit_s * 1e3), list(ranks), what)
    else:
        _poll(pad, places, epoch, limit_s)


def _poll(pad: Tensor, places: Sequence[int], epoch: int, limit_s: float) -> None:
    seen = pad.numpy() if pad.device.type == "cpu" else pad  # NumPy reads without the overhead of a torch op
    until = time.monotonic() + limit_s
    for index, place in enumerate(places):
        while seen[place] < epoch:
            if time.monotonic() > until:
                raise SignalTimeout(index)
            time.sleep(_POLL_S)


def _copies(rows_NB: Tensor, areas: list[Tensor], sent: list[int], there: list[int], first: int) -> None:
    copy_rows(rows_NB, areas, sent, there)


def _put(pads: list[Tensor], place: int, epoch: int) -> None:
    for pad in pads:
        pad[place].fill_(epoch)                              # an assignment would copy from the host and wait


_push_rows = define(
    "push_rows_(Tensor rows_NB, Tensor(a!)[] areas, int[] sent, int[] there, int first) -> ()",
    reference=_copies, fake=lambda *_: None)
_put_signals = define("put_signals_(Tensor(a!)[] pads, int place, int epoch) -> ()",
                      reference=_put, fake=lambda *_: None)
# The pad is declared as changed, although it is only read: a compiler drops an op without results or changes.
_await_signals = define(
    "await_signals_(Tensor(a!) pad, int[] places, int epoch, int limit_ms, int[] ranks, str what) -> ()",
    reference=lambda pad, places, epoch, limit_ms, ranks, what: _poll(pad, places, epoch, limit_ms / 1e3),
    fake=lambda *_: None)
