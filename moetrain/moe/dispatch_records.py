"""Records of a dispatch: its plan, the rows that arrive, and the exchanges under way (dispatch.py).

Shapes: T tokens, K slots per token, D width, N rows that travel, R rows computed, P positions, e physical
slots per position.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moetrain.comm.exchange.base import Handle, Splits
from moetrain.moe.row_packing import SentRows
from moetrain.ops.permute import Permutation, unpermute, unpermute_padded


class DispatchPlan(NamedTuple):
    """Destinations of a chunk's rows, and the rows that arrive here. Integers only, known before rows move.

    Attributes:
        sent_rows: rows that leave, ordered by destination.
        splits: rows to and from each position.
        received_Pe: int64 [P, e], slots that arrive, by source and physical slot.
        num_rows: R.
        counts_e: rows of each physical slot here; a tensor where counts stay on the device.
        num_slots: K of the router, before columns of unused slots were cut off.
    """

    sent_rows: SentRows
    splits: Splits
    received_Pe: Tensor
    num_rows: int
    counts_e: list[int] | Tensor
    num_slots: int


class CombineMetadata(NamedTuple):
    """Integers that the combine needs to send rows back.

    Attributes:
        plan: plan by which the rows were dispatched.
        order: permutation of arrived rows into expert order; None with one position.
    """

    plan: DispatchPlan
    order: Permutation | None


class DispatchedRows(NamedTuple):
    """Rows that have arrived at their experts.

    Attributes:
        x_ND: rows in order of arrival; with one position the tokens themselves.
        order: permutation of arrived rows into expert order; None if they are in it.
        weights_R: gate weights, in expert order.
        counts_e: rows of each physical slot here.
        metadata: for the combine.
    """

    x_ND: Tensor
    order: Permutation | None
    weights_R: Tensor
    counts_e: list[int] | Tensor
    metadata: CombineMetadata


class PendingDispatch(NamedTuple):
    """Dispatch under way: the exchange, and a function that unpacks the rows received."""

    handle: Handle
    unpack: Callable[[tuple[Tensor, ...]], DispatchedRows]

    def wait(self) -> DispatchedRows:
        """Wait for the rows, once."""
        return self.unpack(self.handle.wait())


class PendingCombine(NamedTuple):
    """Combine under way: the exchange of the last chunk, and the outputs of the chunks before it.

    A NamedTuple whose fields hold the tensors, because FSDP2 looks for tensors in what a module returns.

    Attributes:
        handle: exchange of the last chunk.
        permutation: slots of its tokens into rows.
        padded: whether the permutation has rows without a slot (`unpermute_padded`).
        finished: [T, D] of each earlier chunk.
    """

    handle: Handle
    permutation: Permutation
    padded: bool
    finished: tuple[Tensor, ...] = ()

    def wait(self) -> Tensor:
        """Wait for the rows and sum those of each token, [T, D] over all chunks. Once."""
        (rows_ND,) = self.handle.wait()
        last_TD = (unpermute_padded if self.padded else unpermute)(rows_ND, self.permutation)
        return torch.cat([*self.finished, last_TD]) if self.finished else last_TD
