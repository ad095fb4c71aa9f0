"""What travels for a token whose slots lie at several positions, and how it is taken apart there and put together again.

    BySlot    a row for every slot, there and back; the token adds its rows up in the order of its slots
    ByToken   a row for every *position* where the token has slots, with what they are (ids, gate weights) beside it. It is
              expanded there, and one row comes back, the sum of its slots there

The second sends less, k rows of a token to P positions being k (P-1)/P remote ones against (P-1) (1 - (1-1/P)^k): 4.6 for 7.0 at
k = P = 8. It groups sums by position: those of outputs forward, those of gradients backward. Equal to the first to rounding.
In the second form, a position that receives rows is where one that is alone is: its tokens, their ids, their weights.

Shapes: T tokens here, K slots per token, P positions, e slots per position, N rows that travel, R rows computed, D width.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moetrain.ops.counts import count_ids
from moetrain.ops.permute import Permutation, permute, plan_permutation, reorder, unpermute
from moetrain.ops.route_plan import route_plan


class Leaving(NamedTuple):
    """Which rows leave for where."""

    permutation: Permutation     # slots of the tokens here into rows, by destination
    physical_TK: Tensor


class Arrived(NamedTuple):
    """Rows as they arrived, and how the experts read them."""

    x_ND: Tensor
    order: Permutation           # arrived rows into expert order
    weights_R: Tensor            # in expert order


class Rows(Protocol):
    """One of the two forms. counts_Pw: what one position sends to each other, or the same of what it receives."""

    def counts(self, physical_TK: Tensor, positions: int, slots: int) -> Tensor: ...     # [rows,] slots by local slot id: [P, w]
    def plan(self, physical_TK: Tensor, positions: int, slots: int, rows: int) -> Leaving: ...
    def travelling(self, counts_Pw: Tensor) -> Tensor: ...       # rows, [P]
    def computed(self, counts_Pw: Tensor) -> Tensor: ...         # slots, [P, e]
    def load(self, x_TD: Tensor, weights_TK: Tensor, leaving: Leaving, slots: int) -> tuple[Tensor, ...]: ...
    def unload(self, tensors: tuple[Tensor, ...], received_Pe: Tensor, rows: int) -> Arrived: ...
    def back(self, rows_RD: Tensor, order: Permutation) -> Tensor: ...


class BySlot:
    """A row for every slot."""

    def counts(self, physical_TK: Tensor, positions: int, slots: int) -> Tensor:
        return count_ids(physical_TK, positions * slots).view(positions, slots)

    def plan(self, physical_TK: Tensor, positions: int, slots: int, rows: int) -> Leaving:
        return Leaving(ordered(physical_TK, positions * slots, rows), physical_TK)

    def travelling(self, counts_Pw: Tensor) -> Tensor:
        return counts_Pw.sum(1)

    def computed(self, counts_Pw: Tensor) -> Tensor:
        return counts_Pw

    def load(self, x_TD: Tensor, weights_TK: Tensor, leaving: Leaving, slots: int) -> tuple[Tensor, ...]:
        return permute(x_TD, leaving.permutation), slot_weights(weights_TK, leaving.permutation)

    def unload(self, tensors: tuple[Tensor, ...], received_Pe: Tensor, rows: int) -> Arrived:
        x_ND, weights_N = tensors
        order = order_by_source(received_Pe, rows)
        return Arrived(x_ND, order, reorder(weights_N, order.slots_R, order.rows_TK.flatten()))

    def back(self, rows_RD: Tensor, order: Permutation) -> Tensor:
        return reorder(rows_RD, order.rows_TK.flatten(), order.slots_R)


class ByToken:
    """A row for every position where a token has slots."""

    def counts(self, physical_TK: Tensor, positions: int, slots: int) -> Tensor:
        rows_P1 = count_ids(destinations(physical_TK, slots), positions)[:, None]
        return torch.cat([rows_P1, count_ids(physical_TK, positions * slots).view(positions, slots)], dim=1)

    def plan(self, physical_TK: Tensor, positions: int, slots: int, rows: int) -> Leaving:
        return Leaving(ordered(destinations(physical_TK, slots), positions, rows), physical_TK)

    def travelling(self, counts_Pw: Tensor) -> Tensor:
        return counts_Pw[:, 0]

    def computed(self, counts_Pw: Tensor) -> Tensor:
        return counts_Pw[:, 1:]

    def load(self, x_TD: Tensor, weights_TK: Tensor, leaving: Leaving, slots: int) -> tuple[Tensor, ...]:
        permutation, physical_TK = leaving
        physical_NK = physical_TK.index_select(0, permutation.slots_R // physical_TK.shape[1])
        first_N = physical_TK.flatten()[permutation.slots_R]                 # of the slots that brought the row there
        begin_N1 = (first_N - first_N % slots)[:, None]
        local_NK = (physical_NK - begin_N1).to(torch.int32)
        local_NK = local_NK.where((local_NK >= 0) & (local_NK < slots), -1)
        return permute(x_TD, permutation), local_NK, permute(weights_TK, permutation)

    def unload(self, tensors: tuple[Tensor, ...], received_Pe: Tensor, rows: int) -> Arrived:
        x_ND, local_NK, weights_NK = tensors
        order = ordered(local_NK.long(), received_Pe.shape[1], rows)
        return Arrived(x_ND, order, slot_weights(weights_NK, order))

    def back(self, rows_RD: Tensor, order: Permutation) -> Tensor:
        return unpermute(rows_RD, order)


def ordered(physical_TK: Tensor, num_physical: int, rows: int) -> Permutation:
    """Used slots, of which there are `rows`, by id, by token, by slot. On a GPU nothing waits for it."""
    if physical_TK.device.type == "cuda":
        return route_plan(physical_TK, num_physical, rows).permutation
    return plan_permutation(physical_TK, num_physical, rows)


def destinations(physical_TK: Tensor, slots: int) -> Tensor:
    """The position of a slot, where it is the token's first there; else -1."""
    to_TK = physical_TK.div(slots, rounding_mode="floor")                    # -1 stays -1
    return to_TK.where(first_of_kind(to_TK), -1)


def order_by_source(received_Pe: Tensor, rows: int) -> Permutation:
    """Rows that lie by source and then by slot, into expert order: it follows from the counts."""
    slots = torch.arange(received_Pe.shape[1], device=received_Pe.device).repeat(received_Pe.shape[0])
    index_R = slots.repeat_interleave(received_Pe.flatten(), output_size=rows).argsort(stable=True)
    inverse_R = torch.empty_like(index_R)
    inverse_R[index_R] = torch.arange(index_R.numel(), device=index_R.device)
    return Permutation(index_R, inverse_R[:, None], received_Pe.sum(0))


def slot_weights(weights_TK: Tensor, permutation: Permutation) -> Tensor:
    """The weights of the used slots, in the order of the permutation."""
    return weights_TK.flatten().index_select(0, permutation.slots_R)


def first_of_kind(values_TK: Tensor) -> Tensor:
    """True where no earlier slot of the row has the same value."""
    slots = values_TK.shape[1]
    earlier_KK = torch.ones(slots, slots, dtype=torch.bool, device=values_TK.device).tril(-1)
    return ~((values_TK[:, :, None] == values_TK[:, None, :]) & earlier_KK).any(2)
