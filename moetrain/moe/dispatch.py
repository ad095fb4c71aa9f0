"""Tokens to the experts that hold them, and back: assign, permute, exchange put together.

    dispatch   routed slots -> physical slots (plan/assign) -> rows in slot order (ops/permute)
               -> the wire (comm/exchange) -> rows in expert order
    combine    the same way back; every token's rows are summed

The gate weights travel with the rows, so that an expert's output is already weighted and combining is a plain sum. The
experts read arrived rows through an order (ops/grouped_experts.py): rows in expert order are never laid out and kept. With
one position the wire disappears, and what arrives is the tokens themselves.

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


class Ticket(NamedTuple):
    """What `combine` needs to undo a dispatch. Integers only."""

    permutation: Permutation
    splits: Splits
    order: Permutation | None    # received rows (by source, then slot) into expert order; None with one position


class Sent(NamedTuple):
    """Rows at their experts."""

    x_ND: Tensor                 # as they arrived: received rows; with one position the tokens
    order: Permutation           # arrived rows into expert order
    weights_R: Tensor            # in expert order
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
        weights_R = self._row_weights(routing, permutation)
        sent_Pe = permutation.counts_P.view(self.exchange.positions, self.slots)
        received_Pe = self.exchange.counts(sent_Pe)
        splits = Splits(tuple(sent_Pe.sum(1).tolist()), tuple(received_Pe.sum(1).tolist()))

        counts_e = received_Pe.sum(0).tolist()
        if self.exchange.positions == 1:
            return Sent(x_TD, permutation, weights_R, counts_e, Ticket(permutation, splits, None))
        posted = self.exchange.post((permute(x_TD, permutation), weights_R), splits)
        order = self._expert_order(received_Pe)
        x_ND, weights_R = posted.wait()
        weights_R = reorder(weights_R, order.slots_R, order.rows_TK.flatten())
        return Sent(x_ND, order, weights_R, counts_e, Ticket(permutation, splits, order))

    def combine(self, rows_RD: Tensor, ticket: Ticket, *, reduce: bool = True) -> Tensor:
        """Rows back to their tokens: the sum of each token's rows [T, D], or the slots unreduced [T, K, D]."""
        if ticket.order is not None:
            rows_RD = reorder(rows_RD, ticket.order.rows_TK.flatten(), ticket.order.slots_R)
        (rows_ND,) = self.exchange.post((rows_RD,), ticket.splits.reversed()).wait()
        if reduce:
            return unpermute(rows_ND, ticket.permutation)
        tokens, slots = ticket.permutation.rows_TK.shape
        slot_rows = ticket.permutation._replace(rows_TK=ticket.permutation.rows_TK.view(-1, 1))
        return unpermute(rows_ND, slot_rows).view(tokens, slots, -1)

    @staticmethod
    def _row_weights(routing: Routing, permutation: Permutation) -> Tensor:
        return routing.weights_TK.flatten().index_select(0, permutation.slots_R)

    def _expert_order(self, received_Pe: Tensor) -> Permutation:
        slots = torch.arange(self.slots, device=received_Pe.device).repeat(self.exchange.positions)
        index_R = slots.repeat_interleave(received_Pe.flatten()).argsort(stable=True)
        inverse_R = torch.empty_like(index_R)
        inverse_R[index_R] = torch.arange(index_R.numel(), device=index_R.device)
        return Permutation(index_R, inverse_R[:, None], received_Pe.sum(0))
