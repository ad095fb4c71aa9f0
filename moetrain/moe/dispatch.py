"""Tokens to the experts that hold them, and back: assign, permute, exchange put together.

    dispatch   routed slots -> physical slots (plan/assign) -> rows in slot order (ops/permute)
               -> the wire (comm/exchange) -> rows in expert order
    combine    the same way back; every token's rows are summed

Where experts have copies, a rule (plan/split.py) says how many of the rows go to which. Of two kinds: one that looks at
what this position sends alone, and one that looks at the counts of all positions, which are then exchanged before instead
of after. Calibration (plan/calibrate.py) looks at all, too: it may answer with another placement, in force from these rows on.

The gate weights travel with the rows, so that an expert's output is already weighted and combining is a plain sum. The
experts read arrived rows through an order (ops/grouped_experts.py): rows in expert order are never laid out and kept. With
one position the wire disappears, and what arrives is the tokens themselves.

Shapes: T tokens, K slots per token, D width, N used slots here, R rows received, P positions, E experts, C replicas,
e slots per position.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moetrain.comm.exchange.base import Exchange, Splits
from moetrain.ops.permute import Permutation, permute, plan_permutation, reorder, unpermute
from moetrain.plan.assign import assign, replica_table, slot_table, spread
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


class Rule(Protocol):
    """How the rows of an expert are divided among its replicas."""

    looks_at_all: bool           # n must have a row for every position; otherwise every row is divided by itself

    def split(self, n_PE: Tensor, placement: LayerPlacement, first: int) -> Tensor:
        """Rows of each source for each replica, int64 [P, C]. first: the position of the first source."""
        ...


class TokenDispatcher:
    """Dispatch for one layer. Its collectives depend on nothing local: one exchange of counts, one of rows, one back."""

    def __init__(self, placement: LayerPlacement, exchange: Exchange, device: torch.device) -> None:
        self.exchange, self.device = exchange, device
        self.adopt(placement)

    def adopt(self, placement: LayerPlacement, rule: Rule | None = None,
              calibrate: Callable[[Tensor], None] | None = None) -> None:
        """Another placement from the next dispatch on, at all positions at once.

        rule: needed where it has copies, or is calibrated. calibrate: called with the counts of all positions before rows
        are assigned; it may have another placement adopted.
        """
        assert placement.positions == self.exchange.positions, (placement.positions, self.exchange.positions)
        assert rule is not None or not placement.copies and calibrate is None
        self.placement, self.rule, self.calibrate = placement, rule, calibrate
        self.looks_at_all = calibrate is not None or bool(placement.copies) and rule.looks_at_all
        self.slots = placement.slots_per_position
        self.held = len(placement.slots_of(self.exchange.position))
        self.table_E = slot_table(placement, self.device)
        self.replicas = None if rule is None else replica_table(placement, self.device)

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Sent:
        physical_TK, received_Pe = self._assign(routing.ids_TK)
        permutation = plan_permutation(physical_TK, self.exchange.positions * self.slots)
        weights_R = self._row_weights(routing, permutation)
        sent_Pe = permutation.counts_P.view(self.exchange.positions, self.slots)
        if received_Pe is None:
            received_Pe = self.exchange.counts(sent_Pe)
        splits = Splits(tuple(sent_Pe.sum(1).tolist()), tuple(received_Pe.sum(1).tolist()))

        counts_e = received_Pe.sum(0).tolist()[:self.held]           # a position may have fewer slots than others
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

    def _assign(self, ids_TK: Tensor) -> tuple[Tensor, Tensor | None]:
        """Physical slots of the routed slots, and the rows that will arrive, [P, e], if they are known by now."""
        if not self.placement.copies and not self.looks_at_all:
            return assign(ids_TK, self.table_E), None
        position, positions = self.exchange.position, self.exchange.positions
        n_E = torch.bincount(ids_TK.flatten() + 1, minlength=self.placement.num_experts + 1)[1:]
        if not self.looks_at_all:
            (quotas_C,) = self.rule.split(n_E[None], self.placement, position)
            return spread(ids_TK, quotas_C, self.replicas), None
        n_PE = self.exchange.counts(n_E.expand(positions, -1).contiguous())
        if self.calibrate is not None:
            self.calibrate(n_PE)
        split_PC = self.rule.split(n_PE, self.placement, 0)
        here_C = self.replicas.position_C == position
        slots_C = self.replicas.physical_C - position * self.slots
        received_Pe = n_PE.new_zeros(positions, self.slots)
        received_Pe[:, slots_C[here_C]] = split_PC[:, here_C]
        return spread(ids_TK, split_PC[position], self.replicas), received_Pe

    @staticmethod
    def _row_weights(routing: Routing, permutation: Permutation) -> Tensor:
        return routing.weights_TK.flatten().index_select(0, permutation.slots_R)

    def _expert_order(self, received_Pe: Tensor) -> Permutation:
        slots = torch.arange(self.slots, device=received_Pe.device).repeat(self.exchange.positions)
        index_R = slots.repeat_interleave(received_Pe.flatten()).argsort(stable=True)
        inverse_R = torch.empty_like(index_R)
        inverse_R[index_R] = torch.arange(index_R.numel(), device=index_R.device)
        return Permutation(index_R, inverse_R[:, None], received_Pe.sum(0))
