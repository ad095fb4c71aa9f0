"""Rows into the memory of peers, and the signals that say so: what the peer wire does on a device (comm/exchange/peer.py).

    push_rows       rows to their places in the areas of several positions, all in one kernel
    put_signals     an epoch into the pads of several positions: what was written before it is seen by whoever sees it
    await_signals   until the places of a pad hold that epoch or a later one; whoever does not come in time is named

Buffers and pads are mapped here and lie at the peers: memory of this device, of others, or of other processes. A pad is int64, and
what is in it only grows. Without kernels `await_signals` looks at the pad from the host. A kernel takes up to 64 positions.

Shapes: N rows, B bytes of a row, P positions written to.
"""

import time
from collections.abc import Sequence

from torch import Tensor

from moetrain.ops.extension import define, kernels_for

_POLL_S = 20e-6


class SignalTimeout(TimeoutError):
    """index: of the place that did not come in time."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index


def copy_rows(rows_NB: Tensor, areas: Sequence[Tensor], sent: Sequence[int], there: Sequence[int]) -> None:
    """Rows [N, B], uint8, which lie by destination, sent[p] of them for areas[p] (uint8), where they begin at row there[p]. A copy
    for each destination: on a GPU the copy engine's."""
    width = rows_NB.shape[1]
    for area, rows, begin in zip(areas, rows_NB.split(list(sent)), there, strict=True):
        area[begin * width:(begin + len(rows)) * width].copy_(rows.flatten(), non_blocking=True)


def push_rows(rows_NB: Tensor, areas: Sequence[Tensor], sent: Sequence[int], there: Sequence[int], first: int = 0) -> None:
    """`copy_rows` by one kernel of a few blocks, which write to all destinations at once, each beginning with another from `first`
    on. Without kernels, the copies."""
    (_push_rows if kernels_for(rows_NB) else _copies)(rows_NB, list(areas), list(sent), list(there), first)


def put_signals(pads: Sequence[Tensor], place: int, epoch: int) -> None:
    """pads[p][place] = epoch, after everything that this stream has written."""
    (_put_signals if kernels_for(pads[0]) else _put)(list(pads), place, epoch)


def await_signals(pad: Tensor, places: Sequence[int], epoch: int, limit_s: float, ranks: Sequence[int], what: str) -> None:
    """Until pad[place] >= epoch at all places. ranks: who puts each, and last the one that waits; what: is waited for.

    Raises SignalTimeout. A kernel cannot: it prints who waited for whom and for what, and traps, which ends the process."""
    if kernels_for(pad):
        _await_signals(pad, list(places), epoch, int(limit_s * 1e3), list(ranks), what)
    else:
        _poll(pad, places, epoch, limit_s)


def _poll(pad: Tensor, places: Sequence[int], epoch: int, limit_s: float) -> None:
    seen = pad.numpy() if pad.device.type == "cpu" else pad                # plain loads, without torch's overhead
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
        pad[place].fill_(epoch)                              # an assignment would copy a number of the host, and wait


_push_rows = define("push_rows_(Tensor rows_NB, Tensor(a!)[] areas, int[] sent, int[] there, int first) -> ()",
                    reference=_copies, fake=lambda *_: None)
_put_signals = define("put_signals_(Tensor(a!)[] pads, int place, int epoch) -> ()", reference=_put, fake=lambda *_: None)
# The pad is not written, but a call that neither gives nor changes anything would be dropped by a compiler.
_await_signals = define(
    "await_signals_(Tensor(a!) pad, int[] places, int epoch, int limit_ms, int[] ranks, str what) -> ()",
    reference=lambda pad, places, epoch, limit_ms, ranks, what: _poll(pad, places, epoch, limit_ms / 1e3), fake=lambda *_: None)
