"""Row layouts for dispatch: one row per slot, or one row per destination position (deduplicated).

    RowPerSlot    a row for every slot, there and back; a token sums its rows in the order of its slots
    RowPerRank    a row for every *position* where a token has slots, with their ids and gate weights beside it. The position
                  expands it for its experts and returns one row, the sum over the slots there

The second layout sends less: the k rows of a token over P positions are k (P-1)/P remote rows, against (P-1)
(1 - (1-1/P)^k) with one row per position; 7.0 against 4.6 at k = P = 8. It groups sums by position, of
outputs in forward and of gradients in backward, so the two layouts agree up to rounding. A position that
receives deduplicated rows computes as one that is alone: it has tokens, with their ids and weights.

Shapes: T tokens here, K slots per token, P positions, e physical slots per position, N rows that travel, R
rows computed, D width, w = e counts sent to a position (RowPerSlot) or 1 + e (RowPerRank: rows, then slots).
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moetrain.ops.counts import count_ids
from moetrain.ops.permute import Permutation, permute, plan_permutation, reorder, unpermute
from moetrain.ops.route_plan import route_plan


class SentRows(NamedTuple):
    """The rows that leave, ordered by destination."""

    permutation: Permutation     # slots of the tokens here into rows
    physical_TK: Tensor          # int64, physical slot of every routed slot; -1 is unused


class ReceivedRows(NamedTuple):
    """Rows as they arrived, and how the experts read them."""

    x_ND: Tensor
    order: Permutation           # arrived rows into expert order
    weights_R: Tensor            # in expert order


class RowLayout(Protocol):
    """One of the two layouts. counts_Pw: what this position sends to each other one, or receives from it."""

    def counts(self, physical_TK: Tensor, positions: int, slots: int) -> Tensor:
        """Counts to send, int64 [P, w]."""

    def order(self, physical_TK: Tensor, positions: int, slots: int, rows: int) -> SentRows:
        """Order of the rows that leave, `rows` of them."""

    def num_rows(self, counts_Pw: Tensor) -> Tensor:
        """Rows that travel, [P]."""

    def num_slots(self, counts_Pw: Tensor) -> Tensor:
        """Slots to compute, [P, e]."""

    def pack(self, x_TD: Tensor, weights_TK: Tensor, sent: SentRows, slots: int) -> tuple[Tensor, ...]:
        """Tensors that travel side by side, [N, …] each."""

    def unpack(self, tensors: tuple[Tensor, ...], received_Pe: Tensor, rows: int) -> ReceivedRows:
        """What `pack` of all positions sent here, for the experts."""

    def pack_outputs(self, out_RD: Tensor, order: Permutation) -> Tensor:
        """Outputs [N, D] in the order in which their rows arrived."""


class RowPerSlot:
    """One row per slot."""

    def counts(self, physical_TK: Tensor, positions: int, slots: int) -> Tensor:
        return count_ids(physical_TK, positions * slots).view(positions, slots)

    def order(self, physical_TK: Tensor, positions: int, slots: int, rows: int) -> SentRows:
        return SentRows(ordered(physical_TK, positions * slots, rows), physical_TK)

    def num_rows(self, counts_Pw: Tensor) -> Tensor:
        return counts_Pw.sum(1)

    def num_slots(self, counts_Pw: Tensor) -> Tensor:
        return counts_Pw

    def pack(self, x_TD: Tensor, weights_TK: Tensor, sent: SentRows, slots: int) -> tuple[Tensor, ...]:
        return permute(x_TD, sent.permutation), slot_weights(weights_TK, sent.permutation)

    def unpack(self, tensors: tuple[Tensor, ...], received_Pe: Tensor, rows: int) -> ReceivedRows:
        x_ND, weights_N = tensors
        order = order_by_source(received_Pe, rows)
        return ReceivedRows(x_ND, order, reorder(weights_N, order.slots_R, order.rows_TK.flatten()))

    def pack_outputs(self, out_RD: Tensor, order: Permutation) -> Tensor:
        return reorder(out_RD, order.rows_TK.flatten(), order.slots_R)


class RowPerRank:
    """One row per position where a token has slots."""

    def counts(self, physical_TK: Tensor, positions: int, slots: int) -> Tensor:
        rows_P1 = count_ids(destinations(physical_TK, slots), positions)[:, None]
        return torch.cat([rows_P1, count_ids(physical_TK, positions * slots).view(positions, slots)], dim=1)

    def order(self, physical_TK: Tensor, positions: int, slots: int, rows: int) -> SentRows:
        return SentRows(ordered(destinations(physical_TK, slots), positions, rows), physical_TK)

    def num_rows(self, counts_Pw: Tensor) -> Tensor:
        return counts_Pw[:, 0]

    def num_slots(self, counts_Pw: Tensor) -> Tensor:
        return counts_Pw[:, 1:]

    def pack(self, x_TD: Tensor, weights_TK: Tensor, sent: SentRows, slots: int) -> tuple[Tensor, ...]:
        permutation, physical_TK = sent
        physical_NK = physical_TK.index_select(0, permutation.slots_R // physical_TK.shape[1])
        first_N = physical_TK.flatten()[permutation.slots_R]                 # slot for which the row was sent
        begin_N1 = (first_N - first_N % slots)[:, None]
        local_NK = (physical_NK - begin_N1).to(torch.int32)
        local_NK = local_NK.where((local_NK >= 0) & (local_NK < slots), -1)
        return permute(x_TD, permutation), local_NK, permute(weights_TK, permutation)

    def unpack(self, tensors: tuple[Tensor, ...], received_Pe: Tensor, rows: int) -> ReceivedRows:
        x_ND, local_NK, weights_NK = tensors
        order = ordered(local_NK.long(), received_Pe.shape[1], rows)
        return ReceivedRows(x_ND, order, slot_weights(weights_NK, order))

    def pack_outputs(self, out_RD: Tensor, order: Permutation) -> Tensor:
        return unpermute(out_RD, order)


def ordered(physical_TK: Tensor, num_physical: int, rows: int) -> Permutation:
    """Sort used slots by id, then token, then slot.

    rows: their number; given, so that a GPU need not be asked.
    """
    if physical_TK.device.type == "cuda":
        return route_plan(physical_TK, num_physical, rows).permutation
    return plan_permutation(physical_TK, num_physical, rows)


def destinations(physical_TK: Tensor, slots: int) -> Tensor:
    """The position of each slot that is its token's first there, int64 [T, K]; -1 for the others."""
    to_TK = physical_TK.div(slots, rounding_mode="floor")                    # -1 stays -1
    return to_TK.where(first_of_kind(to_TK), -1)


def order_by_source(received_Pe: Tensor, rows: int) -> Permutation:
    """Permutation of rows that lie by source, then slot, into expert order.

    It follows from the counts alone.
    """
    slots = torch.arange(received_Pe.shape[1], device=received_Pe.device).repeat(received_Pe.shape[0])
    index_R = slots.repeat_interleave(received_Pe.flatten(), output_size=rows).argsort(stable=True)
    inverse_R = torch.empty_like(index_R)
    inverse_R[index_R] = torch.arange(index_R.numel(), device=index_R.device)
    return Permutation(index_R, inverse_R[:, None], received_Pe.sum(0))


def slot_weights(weights_TK: Tensor, permutation: Permutation) -> Tensor:
    """Weights of the used slots, [R], in the order of the permutation."""
    return weights_TK.flatten().index_select(0, permutation.slots_R)


def first_of_kind(values_TK: Tensor) -> Tensor:
    """True where no earlier slot of the row has the same value."""
    slots = values_TK.shape[1]
    earlier_KK = torch.ones(slots, slots, dtype=torch.bool, device=values_TK.device).tril(-1)
    return ~((values_TK[:, :, None] == values_TK[:, None, :]) & earlier_KK).any(2)
