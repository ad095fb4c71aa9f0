"""Tokens to the experts that hold them, and back: assign, permute, exchange put together.

    dispatch   routed slots -> physical slots (plan/assign) -> rows in slot order (ops/permute)
               -> the wire (comm/exchange) -> rows in expert order
    combine    the same way back; every token's rows are summed

The gate weights travel with the rows, so that an expert's output is already weighted and combining is a plain sum. With
one position the wire and the second ordering disappear; nothing else changes.

Shapes: T tokens, K slots per token, D width, N used slots here, R rows received, P positions, e slots per position.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moetrain.comm.exchange.base import Exchange, Splits
from moetrain.ops.permute import Permutation, permute, plan_permutation, reorder, unpermute
from moetrain.plan.assign import assign, slot_table
from moetrain.plan.placement import LayerPlacement
from moetrain.routers.base import Routing


class Order(NamedTuple):
    """Received rows (by source, then slot) into expert order, and the inverse."""

    index_R: Tensor
    inverse_R: Tensor


class Ticket(NamedTuple):
    """What `combine` needs to undo a dispatch. Integers only."""

    permutation: Permutation
    splits: Splits
    order: Order | None          # None with one position: rows arrive in expert order


class Sent(NamedTuple):
    """Rows at their experts."""

    rows_RD: Tensor
    weights_R: Tensor
    counts_e: list[int]          # rows per local slot, on the host
    ticket: Ticket


class TokenDispatcher:
    """Dispatch for one layer. Its collectives depend on nothing local: one exchange of counts, one of rows, one back."""

    def __init__(self, placement: LayerPlacement, exchange: Exchange, device: torch.device) -> None:
        assert placement.positions == exchange.positions, (placement.positions, exchange.positions)
        self.exchange = exchange
        self.slots = placement.slots_per_position
        self.table_E = slot_table(placement, device)

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Sent:
        physical_TK = assign(routing.ids_TK, self.table_E)
        permutation = plan_permutation(physical_TK, self.exchange.positions * self.slots)
        sent_Pe = permutation.counts_P.view(self.exchange.positions, self.slots)
        received_Pe = self.exchange.counts(sent_Pe)
        splits = Splits(tuple(sent_Pe.sum(1).tolist()), tuple(received_Pe.sum(1).tolist()))

        posted = self.exchange.post((permute(x_TD, permutation), self._row_weights(routing, permutation)), splits)
        order = self._expert_order(received_Pe)
        rows_RD, weights_R = posted.wait()
        if order is not None:
            rows_RD, weights_R = reorder(rows_RD, *order), reorder(weights_R, *order)
        return Sent(rows_RD, weights_R, received_Pe.sum(0).tolist(), Ticket(permutation, splits, order))

    def combine(self, rows_RD: Tensor, ticket: Ticket, *, reduce: bool = True) -> Tensor:
        """Rows back to their tokens: the sum of each token's rows [T, D], or the slots unreduced [T, K, D]."""
        if ticket.order is not None:
            rows_RD = reorder(rows_RD, ticket.order.inverse_R, ticket.order.index_R)
        (rows_ND,) = self.exchange.post((rows_RD,), ticket.splits.reversed()).wait()
        if reduce:
            return unpermute(rows_ND, ticket.permutation)
        tokens, slots = ticket.permutation.rows_TK.shape
        slot_rows = ticket.permutation._replace(rows_TK=ticket.permutation.rows_TK.view(-1, 1))
        return unpermute(rows_ND, slot_rows).view(tokens, slots, -1)

    @staticmethod
    def _row_weights(routing: Routing, permutation: Permutation) -> Tensor:
        return routing.weights_TK.flatten().index_select(0, permutation.slots_R)

    def _expert_order(self, received_Pe: Tensor) -> Order | None:
        if self.exchange.positions == 1:
            return None
        slots = torch.arange(self.slots, device=received_Pe.device).repeat(self.exchange.positions)
        index_R = slots.repeat_interleave(received_Pe.flatten()).argsort(stable=True)
        inverse_R = torch.empty_like(index_R)
        inverse_R[index_R] = torch.arange(index_R.numel(), device=index_R.device)
        return Order(index_R, inverse_R)
