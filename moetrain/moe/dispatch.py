"""Tokens to the experts that hold them, and back: assign, permute, exchange put together.

    prepare     routed slots -> physical slots (plan/assign) -> which rows leave for where; counts are exchanged
    send        rows, in the order of their destinations (moe/row_packing.py), leave over the wire (comm/exchange)
    send_back   the same way back; every token's rows are summed

`prepare` is done once for a micro-batch, for all of its chunks (moe/overlap.py); rows travel chunk by chunk. `dispatch` and
`combine` are the same for a micro-batch in one piece.

Where experts have copies, a rule (plan/splitting/split.py) says how many of the rows go to which, for every chunk by itself. Of two kinds:
one that looks at what this position sends alone, and one that looks at the counts of all positions, which are then exchanged
before that. Calibration (plan/calibration.py) looks at all, too: it may answer with another placement, in force from these rows on.

The gate weights travel with the rows, so that an expert's output is already weighted and combining is a plain sum. The
experts read arrived rows through an order (ops/grouped_experts.py): rows in expert order are never laid out and kept. With
one position the wire disappears, and what arrives is the tokens themselves. On a GPU nothing then waits for the host: there are as
many rows as slots, the used ones first (ops/route_plan.py), and counts stay on the device. With several, the host waits once a
micro-batch, for how many rows travel. (Never run on a GPU; a CPU keeps lists, which are faster there.)

Shapes: T tokens, K slots per token, D width, N rows that travel, R rows computed, P positions, E experts, C replicas,
e slots per position, w counts for a position (moe/row_packing.py).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moetrain.comm.exchange.base import Exchange, Handle, Splits, read_splits
from moetrain.moe.row_packing import (
    Arrived,
    BySlot,
    ByToken,
    Leaving,
    order_by_source,
    slot_weights,
)
from moetrain.ops.counts import count_ids
from moetrain.ops.host_read import read_host
from moetrain.ops.permute import Permutation, plan_permutation, unpermute, unpermute_padded, values_of_rows
from moetrain.ops.pinned import DeviceTables, to_device
from moetrain.ops.route_plan import route_plan
from moetrain.plan.assign import Replicas, assign, replica_table, slot_table, spread
from moetrain.plan.placement import LayerPlacement
from moetrain.routers.base import Routing


class Course(NamedTuple):
    """Where the rows of a chunk go and what comes here, before any moves. Integers only."""

    leaving: Leaving
    splits: Splits
    received_Pe: Tensor          # slots by source and local slot id
    rows: int                    # R
    counts_e: list[int] | Tensor     # rows computed here by local slot; on a GPU they stay there


class Ticket(NamedTuple):
    """What the way back needs. Integers only."""

    course: Course
    order: Permutation | None    # arrived rows into expert order; None with one position


class Sent(NamedTuple):
    """Rows at their experts."""

    x_ND: Tensor                 # as they arrived: received rows; with one position the tokens
    order: Permutation | None    # arrived rows into expert order; None where they lie in it
    weights_R: Tensor            # in expert order
    counts_e: list[int] | Tensor     # rows per local slot
    ticket: Ticket


class Arriving(NamedTuple):
    """Rows on their way to their experts."""

    handle: Handle
    take: Callable[[tuple[Tensor, ...]], Sent]

    def wait(self) -> Sent:
        return self.take(self.handle.wait())


class Returning(NamedTuple):
    """Rows on their way back to their tokens. A tuple that holds its tensors in sight: FSDP2 looks for them in what leaves a
    module."""

    handle: Handle
    permutation: Permutation
    padded: bool

    def wait(self) -> Tensor:
        """The sum of each token's rows, [T, D]."""
        (rows_ND,) = self.handle.wait()
        return (unpermute_padded if self.padded else unpermute)(rows_ND, self.permutation)


class Rule(Protocol):
    """How the rows of an expert are divided among its replicas."""

    looks_at_all: bool           # n must have a row for every position; otherwise every row is divided by itself

    def split(self, n_PE: Tensor, placement: LayerPlacement, first: int) -> Tensor:
        """Rows of each source for each replica, int64 [P, C]. first: the position of the first source."""
        ...


class TokenDispatcher:
    """Dispatch for one layer. Its collectives depend on nothing local: one exchange of counts, two where rows are divided by the
    counts of all and travel by token; and for every chunk one of rows, one back.

    exact: a row travels for every slot, and sums do not depend on who holds an expert; otherwise one for every position where
    a token has slots (moe/row_packing.py). on_device: counts that the host need not know stay on the device (ops/grouped_experts.py says
    what that asks of dtype and widths).
    """

    def __init__(self, placement: LayerPlacement, exchange: Exchange, device: torch.device, *, exact: bool = False,
                 on_device: bool = False) -> None:
        self.exchange, self.device = exchange, device
        self.rows = BySlot() if exact else ByToken()
        self.on_device = on_device
        self.remote_rows = 0                                 # sent to other positions so far, forward
        with DeviceTables(device) as tables:
            self.adopt(placement, tables)

    def adopt(self, placement: LayerPlacement, tables: DeviceTables, rule: Rule | None = None,
              calibrate: Callable[[Tensor], None] | None = None) -> None:
        """Another placement from the next dispatch on, at all positions at once.

        Args:
            placement: the new one.
            tables: which those of the placement are put among.
            rule: needed where it has copies, or is calibrated.
            calibrate: called with the counts of all positions before rows are assigned; it may have another placement adopted.
        """
        assert placement.positions == self.exchange.positions, (placement.positions, self.exchange.positions)
        assert rule is not None or not placement.copies and calibrate is None
        self.placement, self.rule, self.calibrate = placement, rule, calibrate
        self.looks_at_all = calibrate is not None or bool(placement.copies) and rule.looks_at_all
        self.slots = placement.slots_per_position
        self.held = len(placement.slots_of(self.exchange.position))
        self.table_E = tables.put(slot_table(placement))
        self.replica_table_3C = None if rule is None else replica_table(placement)
        self.replicas = None if rule is None else Replicas(*tables.put(self.replica_table_3C))

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Sent:
        (course,) = self.prepare([routing.ids_TK])
        return self.send(x_TD, routing.weights_TK, course).wait()

    def combine(self, rows_RD: Tensor, ticket: Ticket, *, reduce: bool = True) -> Tensor:
        """Rows back to their tokens: the sum of each token's rows [T, D], or the slots unreduced [T, K, D]."""
        return self.send_back(rows_RD, ticket).wait() if reduce else self._unreduced(rows_RD, ticket)

    def prepare(self, ids: list[Tensor]) -> list[Course]:
        """Courses of a micro-batch's chunks. ids: of the experts of each, [T, K]."""
        physical, known = self._assign(ids)                  # may change the placement
        if self.exchange.positions == 1:
            return [self._alone(each) for each in physical]
        sent_PCw = torch.stack([self.rows.counts(each, self.exchange.positions, self.slots) for each in physical], dim=1)
        if known is not None and isinstance(self.rows, BySlot):
            received_PCw = torch.stack(known, dim=1)
        else:
            received_PCw = self.exchange.counts(sent_PCw.flatten(1)).view_as(sent_PCw)
        return self._courses(physical, sent_PCw.unbind(1), received_PCw.unbind(1))

    def _courses(self, physical: list[Tensor], sent: Sequence[Tensor], received: Sequence[Tensor]) -> list[Course]:
        """Courses of all chunks from counts [P, w] of each. Here, once, the host waits for the device."""
        positions, slots = self.exchange.positions, [self.rows.computed(received_Pw) for received_Pw in received]
        sent_CP, received_CP = (torch.stack([self.rows.travelling(counts_Pw) for counts_Pw in way]) for way in (sent, received))
        computed_Ce = torch.stack([received_Pe.sum(0) for received_Pe in slots])
        splits, counts = read_splits(self.exchange, sent_CP, received_CP, computed_Ce)
        return [Course(self.rows.plan(physical_TK, positions, self.slots, sum(way.sent)), way, received_Pe, sum(counts_e),
                       received_Pe.sum(0)[:self.held] if self.on_device else counts_e[:self.held])   # others may have more slots
                for physical_TK, way, received_Pe, counts_e in zip(physical, splits, slots, counts, strict=True)]

    def send(self, x_TD: Tensor, weights_TK: Tensor, course: Course) -> Arriving:
        """Start bringing a chunk's rows to their experts."""
        if self.exchange.positions == 1:
            order = course.leaving.permutation
            arrived = Arrived(x_TD, order, (values_of_rows if self.on_device else slot_weights)(weights_TK, order))
            return Arriving(self.exchange.post((x_TD,), course.splits),
                            lambda _: Sent(*arrived, course.counts_e, Ticket(course, None)))
        here = self.exchange.position
        self.remote_rows += sum(course.splits.sent) - course.splits.sent[here]
        handle = self.exchange.post(self.rows.load(x_TD, weights_TK, course.leaving, self.slots), course.splits)

        def take(tensors: tuple[Tensor, ...]) -> Sent:
            arrived = self.rows.unload(tensors, course.received_Pe, course.rows)
            return Sent(*arrived, course.counts_e, Ticket(course, arrived.order))

        return Arriving(handle, take)

    def send_back(self, rows_RD: Tensor, ticket: Ticket) -> Returning:
        """Start bringing the experts' outputs back."""
        course, order = ticket
        rows_ND = rows_RD if order is None else self.rows.back(rows_RD, order)
        return Returning(self.exchange.post((rows_ND,), course.splits.reversed(), read=False), course.leaving.permutation,
                         self.on_device)

    def _assign(self, ids: list[Tensor]) -> tuple[list[Tensor], list[Tensor] | None]:
        """Physical slots of the routed slots, and the slots that will arrive, [P, e], where they are known by now."""
        if not self.placement.copies and not self.looks_at_all:
            return [assign(ids_TK, self.table_E) for ids_TK in ids], None
        position, positions = self.exchange.position, self.exchange.positions
        n_CE = torch.stack([count_ids(ids_TK, self.placement.num_experts) for ids_TK in ids])
        if not self.looks_at_all:
            return [spread(ids_TK, *self.rule.split(n_E[None], self.placement, position), self.replicas)
                    for ids_TK, n_E in zip(ids, n_CE)], None
        n_PCE = self.exchange.counts(n_CE.flatten().expand(positions, -1).contiguous()).view(positions, *n_CE.shape)
        n_PCE = read_host(n_PCE)                             # the host waits
        if self.calibrate is not None:
            self.calibrate(n_PCE.sum(1))
        splits = [self.rule.split(n_PE, self.placement, 0) for n_PE in n_PCE.unbind(1)]
        return ([spread(ids_TK, to_device(split_PC[position], self.device), self.replicas) for ids_TK, split_PC in zip(ids, splits)],
                [to_device(self._arriving(split_PC), self.device) for split_PC in splits])

    def _arriving(self, split_PC: Tensor) -> Tensor:
        """Slots that arrive here, by source and local slot id, [P, e]. On the host."""
        _, position_C, physical_C = self.replica_table_3C
        here_C = position_C == self.exchange.position
        slots_C = physical_C - self.exchange.position * self.slots
        received_Pe = split_PC.new_zeros(self.exchange.positions, self.slots)
        received_Pe[:, slots_C[here_C]] = split_PC[:, here_C]
        return received_Pe

    def _alone(self, physical_TK: Tensor) -> Course:
        """With one position slots are rows, and all of them are here."""
        if self.on_device:
            permutation, _ = route_plan(physical_TK, self.slots, physical_TK.numel())
            rows, counts_e = physical_TK.numel(), permutation.counts_P[:self.held]
        else:
            counts_e = read_host(count_ids(physical_TK, self.slots)).tolist()[:self.held]    # the host waits
            rows = sum(counts_e)
            permutation = plan_permutation(physical_TK, self.slots, rows)
        return Course(Leaving(permutation, physical_TK), Splits((rows,), (rows,)), permutation.counts_P[None], rows, counts_e)

    def _unreduced(self, rows_RD: Tensor, ticket: Ticket) -> Tensor:
        """The output of every slot, [T, K, D]: a row comes back for each, however they came here."""
        course, order = ticket
        physical_TK, positions = course.leaving.physical_TK, self.exchange.positions
        permutation = course.leaving.permutation
        if order is not None:
            sent_1P = BySlot().counts(physical_TK, positions, self.slots).sum(1)[None]
            received_1P = course.received_Pe.sum(1)[None]
            (splits,), _ = read_splits(self.exchange, sent_1P, received_1P, sent_1P[:, :0])
            permutation = BySlot().plan(physical_TK, positions, self.slots, sum(splits.sent)).permutation
            rows_RD = BySlot().back(rows_RD, order_by_source(course.received_Pe, course.rows))
            (rows_RD,) = self.exchange.post((rows_RD,), splits.reversed()).wait()
        slots_as_tokens = permutation._replace(rows_TK=permutation.rows_TK.view(-1, 1))
        return (unpermute_padded if self.on_device else unpermute)(rows_RD, slots_as_tokens).view(*physical_TK.shape, -1)
