"""Row layouts for dispatch: one row per slot, or one row per destination position (deduplicated).

    RowPerSlot    a row for every slot, in both directions; a token sums its rows in the order of its slots
    RowPerRank    a row for every position where a token has slots, with their ids and gate weights. The
                  position expands it for its experts and returns one row, the sum over the slots there

The second layout sends less. With k uniform choices over P positions, a token has

    RowPerSlot    k (P-1)/P remote rows                7.0 at k = P = 8
    RowPerRank    (P-1) (1 - (1-1/P)^k) remote rows    4.6 at k = P = 8

The second layout groups the sums of outputs (forward) and of gradients (backward) by position, so the two
agree up to rounding. A position that receives deduplicated rows computes like a single position: it has
tokens, with their ids and weights.

A deduplicated row has room for W slots. Where a token uses few of its K slots, W is the most slots that any
token of any rank has at one position, and a row carries the slots of its destination alone.
Otherwise W is K, and a row carries all slots, those of other positions as unused.

Shapes: T tokens here, K slots per token, P positions, e physical slots per position, N rows that travel, R
rows computed, D width, W slots of a row, w = e counts sent to a position
(RowPerSlot) or 1 + e (RowPerRank: rows, then slots).
"""

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.ops.counts import count_ids
from moetrain.ops.gating import order_used_first
from moetrain.ops.permute import Permutation, permute, plan_permutation, reorder, unpermute
from moetrain.ops.route_plan import route_plan

# Slots up to which `first_of_kind` compares all pairs, as [T, K, K] booleans. It sorts more of them.
COMPARED = 16


class SentRows(NamedTuple):
    """Rows that leave, ordered by destination.

    Attributes:
        permutation: slots of the tokens here into rows.
        physical_TK: int64, physical slot of every routed slot; -1 is unused.
        width: W, slots for which a deduplicated row has room, the same on all ranks.
    """

    permutation: Permutation
    physical_TK: Tensor
    width: int


class ReceivedRows(NamedTuple):
    """Rows in order of arrival, and the permutation through which experts read them.

    Attributes:
        x_ND: rows in order of arrival.
        order: permutation of arrived rows into expert order.
        weights_R: gate weights, in expert order.
    """

    x_ND: Tensor
    order: Permutation
    weights_R: Tensor


class RowLayout(Protocol):
    """Layout of the rows that dispatch sends: which rows there are, and how they are packed and unpacked.

    Counts [P, w] say what this position sends to every position, or receives from it.
    """

    def counts(self, physical_TK: Tensor, positions: int, slots: int) -> Tensor:
        """Count what this position sends.

        Args:
            physical_TK: int64 [T, K], physical slot of every routed slot; -1 is unused.
            positions: P.
            slots: e.

        Returns:
            int64 [P, w].
        """

    def order(self, physical_TK: Tensor, positions: int, slots: int, rows: int, width: int) -> SentRows:
        """Order the rows that leave by destination.

        Args:
            physical_TK: int64 [T, K], physical slot of every routed slot; -1 is unused.
            positions: P.
            slots: e.
            rows: N, number of rows that leave.
            width: W, slots of a row.
        """

    def num_rows(self, counts_w: Tensor) -> Tensor:
        """Read the numbers of rows that travel, int64 [...], from counts [..., w]."""

    def num_slots(self, counts_w: Tensor) -> Tensor:
        """Read the numbers of slots to compute, int64 [..., e], from counts [..., w]."""

    def pack(self, x_TD: Tensor, weights_TK: Tensor, sent: SentRows, slots: int) -> tuple[Tensor, ...]:
        """Pack tokens into the rows that leave.

        Args:
            x_TD: [T, D], tokens.
            weights_TK: [T, K], gate weights.
            sent: rows that leave, from `order`.
            slots: e.

        Returns:
            Tensors [N, …] that travel side by side.
        """

    def unpack(self, tensors: tuple[Tensor, ...], received_Pe: Tensor, rows: int) -> ReceivedRows:
        """Unpack the rows that arrived from all positions for the experts here.

        Args:
            tensors: as `pack` makes them, rows ordered by source.
            received_Pe: int64 [P, e], slots that arrived, by source and physical slot.
            rows: R, number of slots to compute.
        """

    def pack_outputs(self, out_RD: Tensor, order: Permutation) -> Tensor:
        """Bring outputs [R, D] into the order in which their rows arrived, [N, D]."""


class RowPerSlot:
    """Layout with one row per slot; see `RowLayout`."""

    def counts(self, physical_TK: Tensor, positions: int, slots: int) -> Tensor:
        return count_ids(physical_TK, positions * slots).view(positions, slots)

    def order(self, physical_TK: Tensor, positions: int, slots: int, rows: int, width: int) -> SentRows:
        return SentRows(ordered(physical_TK, positions * slots, rows), physical_TK, width)

    def num_rows(self, counts_w: Tensor) -> Tensor:
        return counts_w.sum(-1)

    def num_slots(self, counts_w: Tensor) -> Tensor:
        return counts_w

    def pack(self, x_TD: Tensor, weights_TK: Tensor, sent: SentRows, slots: int) -> tuple[Tensor, ...]:
        return permute(x_TD, sent.permutation), slot_weights(weights_TK, sent.permutation)

    def unpack(self, tensors: tuple[Tensor, ...], received_Pe: Tensor, rows: int) -> ReceivedRows:
        x_ND, weights_N = tensors
        order = order_by_source(received_Pe, rows)
        return ReceivedRows(x_ND, order, reorder(weights_N, order.slots_R, order.rows_TK.flatten()))

    def pack_outputs(self, out_RD: Tensor, order: Permutation) -> Tensor:
        return reorder(out_RD, order.rows_TK.flatten(), order.slots_R)


class RowPerRank:
    """Layout with one row per position where a token has slots; see `RowLayout`."""

    def counts(self, physical_TK: Tensor, positions: int, slots: int) -> Tensor:
        rows_P1 = count_ids(destinations(physical_TK, slots), positions)[:, None]
        return torch.cat([rows_P1, count_ids(physical_TK, positions * slots).view(positions, slots)], dim=1)

    def order(self, physical_TK: Tensor, positions: int, slots: int, rows: int, width: int) -> SentRows:
        return SentRows(ordered(destinations(physical_TK, slots), positions, rows), physical_TK, width)

    def num_rows(self, counts_w: Tensor) -> Tensor:
        return counts_w[..., 0]

    def num_slots(self, counts_w: Tensor) -> Tensor:
        return counts_w[..., 1:]

    def pack(self, x_TD: Tensor, weights_TK: Tensor, sent: SentRows, slots: int) -> tuple[Tensor, ...]:
        permutation, physical_TK, width = sent
        physical_NK = physical_TK.index_select(0, permutation.slots_R // physical_TK.shape[1])
        first_N = physical_TK.flatten()[permutation.slots_R]                 # the token's first slot there
        begin_N1 = (first_N - first_N % slots)[:, None]
        local_NK = (physical_NK - begin_N1).to(torch.int32)
        local_NK = local_NK.where((local_NK >= 0) & (local_NK < slots), -1)
        weights_NK = permute(weights_TK, permutation)
        if width == physical_TK.shape[1]:
            return permute(x_TD, permutation), local_NK, weights_NK
        used_first_NW = order_used_first(local_NK)[:, :width]
        room = (0, width - used_first_NW.shape[1])                           # other ranks may need more
        return (permute(x_TD, permutation), F.pad(local_NK.gather(1, used_first_NW), room, value=-1),
                F.pad(weights_NK.gather(1, used_first_NW), room))

    def unpack(self, tensors: tuple[Tensor, ...], received_Pe: Tensor, rows: int) -> ReceivedRows:
        x_ND, local_NK, weights_NK = tensors
        order = ordered(local_NK.long(), received_Pe.shape[1], rows)
        return ReceivedRows(x_ND, order, slot_weights(weights_NK, order))

    def pack_outputs(self, out_RD: Tensor, order: Permutation) -> Tensor:
        return unpermute(out_RD, order)


def ordered(physical_TK: Tensor, num_physical: int, rows: int) -> Permutation:
    """Order used slots by id, then by token, then by slot.

    Args:
        physical_TK: int64 [T, K], id of each slot; -1 is unused.
        num_physical: number of ids.
        rows: number of used slots; given, so that the host need not wait for a GPU.

    Returns:
        Permutation of slots into rows.
    """
    if physical_TK.device.type == "cuda":
        return route_plan(physical_TK, num_physical, rows).permutation
    return plan_permutation(physical_TK, num_physical, rows)


def destinations(physical_TK: Tensor, slots: int) -> Tensor:
    """Find the positions that each token goes to, int64 [T, K].

    The first slot of a token at a position gets that position. The other slots get -1.
    """
    to_TK = physical_TK.div(slots, rounding_mode="floor")                    # -1 stays -1
    return to_TK.where(first_of_kind(to_TK), -1)


def most_at_one_position(physical_TK: Tensor, positions: int, slots: int) -> Tensor:
    """Count the most slots that a token has at one position, int64 scalar; 0 without tokens.

    Args:
        physical_TK: int64 [T, K], physical slot of every routed slot; -1 is unused.
        positions: P.
        slots: e.
    """
    columns_TK = physical_TK.div(slots, rounding_mode="floor") + 1           # column 0 takes the unused slots
    ones_TK = torch.ones_like(columns_TK, dtype=torch.int32)
    slots_TP = ones_TK.new_zeros(len(ones_TK), positions + 1).scatter_add_(1, columns_TK, ones_TK)[:, 1:]
    return F.pad(slots_TP.flatten(), (0, 1)).amax().long()


def order_by_source(received_Pe: Tensor, rows: int) -> Permutation:
    """Plan the permutation of arrived rows, ordered by source and then by physical slot, into expert order.

    It follows from the counts [P, e] alone.
    """
    slots = torch.arange(received_Pe.shape[1], device=received_Pe.device).repeat(received_Pe.shape[0])
    index_R = slots.repeat_interleave(received_Pe.flatten(), output_size=rows).argsort(stable=True)
    inverse_R = torch.empty_like(index_R)
    inverse_R[index_R] = torch.arange(index_R.numel(), device=index_R.device)
    return Permutation(index_R, inverse_R[:, None], received_Pe.sum(0))


def slot_weights(weights_TK: Tensor, permutation: Permutation) -> Tensor:
    """Select the gate weights of the used slots, [R], in the order of the permutation."""
    return weights_TK.flatten().index_select(0, permutation.slots_R)


def first_of_kind(values_TK: Tensor) -> Tensor:
    """Mark the slots whose value no earlier slot of the same token has, bool [T, K]."""
    slots = values_TK.shape[1]
    if slots > COMPARED:
        sorted_TK, slots_TK = values_TK.sort(dim=1, stable=True)
        first_TK = torch.ones_like(values_TK, dtype=torch.bool)
        first_TK[:, 1:] = sorted_TK[:, 1:] != sorted_TK[:, :-1]
        return torch.empty_like(first_TK).scatter_(1, slots_TK, first_TK)
    earlier_KK = torch.ones(slots, slots, dtype=torch.bool, device=values_TK.device).tril(-1)
    return ~((values_TK[:, :, None] == values_TK[:, None, :]) & earlier_KK).any(2)
