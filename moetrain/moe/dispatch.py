"""Token dispatch: plan where rows go, send them to their experts, and combine the outputs.

    plan              assign routed slots to physical slots (plan/assign.py), exchange counts
    dispatch_async    start sending rows, ordered by destination (row_packing.py), to their experts
    combine_async     start sending outputs back; the rows of each token are then summed

`plan` runs once a micro-batch, for all of its chunks (overlap.py). Rows travel chunk by chunk, through an
exchange backend (comm/exchange/). `dispatch` and `combine` are the waiting forms, for a micro-batch that is
one chunk.

Where experts have copies, a split rule (plan/splitting/split.py) divides the rows of an expert among its
replicas, for each chunk separately. A rule needs either the counts of this position alone, or those of all
positions, which are then exchanged first. Calibration (plan/calibration.py) needs all counts, too. It may put
another placement in force for these rows.

Gate weights travel with the rows, so an expert's output is already weighted and the combine is a plain sum.
The experts read arrived rows through a permutation (ops/grouped_experts.py), which saves a copy in expert
order. With one position nothing is exchanged, and the arrived rows are the tokens themselves.

The host waits once a micro-batch, for the numbers of rows that travel. With one position on a GPU it waits
for nothing: the number of rows is a bound on the used slots, used ones first (ops/route_plan.py), and counts
stay on the device. (The path for a GPU has never run on one. A CPU keeps counts in lists, which are faster
there.)

A router that may use all of many slots and uses few (K = E) gives no bound (`Routing.max_rows`). Then used
slots are counted first, and a host waits for the number where it would not otherwise. From there on K is the
most slots that a token of the chunk uses, so memory and messages are those of the used slots.

Shapes: T tokens, K slots per token, D width, N rows that travel, R rows computed, P positions, E experts, C
replicas (in `n_CE`, `n_PCE` and `*_CP`: chunks), e physical slots per position, w counts sent to a position
(row_packing.py).
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.comm.exchange.base import Exchange, Splits, read_splits
from moetrain.moe.dispatch_records import (
    CombineMetadata,
    DispatchedRows,
    DispatchPlan,
    PendingCombine,
    PendingDispatch,
)
from moetrain.moe.row_packing import (
    ReceivedRows,
    RowPerRank,
    RowPerSlot,
    SentRows,
    most_at_one_position,
    order_by_source,
    slot_weights,
)
from moetrain.ops.counts import count_ids
from moetrain.ops.host_read import read_host
from moetrain.ops.permute import plan_permutation, unpermute, unpermute_padded, values_of_rows
from moetrain.ops.pinned import DeviceTables, to_device
from moetrain.ops.route_plan import route_plan
from moetrain.plan.assign import Replicas, assign, replica_table, slot_table, spread
from moetrain.plan.placement import LayerPlacement


class SplitRule(Protocol):
    """Rule that divides the rows of an expert among its replicas (plan/splitting/rules.py).

    A rule that does not need all counts divides the rows of each source independently of other sources.
    """

    needs_all_counts: bool           # whether a position needs the counts of the others, too

    def split(self, n_PE: Tensor, placement: LayerPlacement, first: int) -> Tensor:
        """Divide the rows of each source over the replicas.

        Args:
            n_PE: int64 [P, E], rows of consecutive source positions for each expert.
            placement: homes and copies of the layer.
            first: position of the first source.

        Returns:
            int64 [P, C], rows from each source for each replica.
        """
        ...


class TokenDispatcher:
    """Dispatch and combine for the tokens of one layer.

    The collectives follow from the config alone: an exchange of counts for each micro-batch (two where a rule
    needs all counts and rows are deduplicated), and for each chunk one exchange of rows in each direction.

    Args:
        placement: homes of the experts.
        exchange: backend that moves rows between positions.
        device: device of the tokens.
        exact: send a row for every slot, so that sums do not depend on which position holds an expert. False:
            send a row for every position where a token has slots (row_packing.py).
        on_device: leave counts that the host need not know on the device (ops/grouped_experts.py states the
            dtypes and widths for which that works).
    """

    def __init__(self, placement: LayerPlacement, exchange: Exchange, device: torch.device, *,
                 exact: bool = False, on_device: bool = False) -> None:
        self.exchange, self.device = exchange, device
        self.layout = RowPerSlot() if exact else RowPerRank()
        self.on_device = on_device
        self.remote_rows = 0                                 # sent to other positions so far, in forward
        with DeviceTables(device) as tables:
            self.set_placement(placement, tables)

    def set_placement(self, placement: LayerPlacement, tables: DeviceTables, rule: SplitRule | None = None,
                      calibrate: Callable[[Tensor], None] | None = None) -> None:
        """Put a placement in force from the next dispatch on. All positions do so at once.

        Args:
            placement: homes and copies of the layer.
            tables: where the lookup tables of the placement are put on the device.
            rule: divides rows among replicas; required with copies and with calibration.
            calibrate: called before rows are assigned, with the int64 counts [P, E] of all positions for
                the micro-batch, on the host. It may set another placement.
        """
        assert placement.positions == self.exchange.positions, (placement.positions, self.exchange.positions)
        assert rule is not None or not placement.copies and calibrate is None
        self.placement, self.rule, self.calibrate = placement, rule, calibrate
        asks_all = bool(placement.copies) and rule is not None and rule.needs_all_counts
        self.needs_all_counts = calibrate is not None or asks_all
        self.slots = placement.slots_per_position
        self.held = len(placement.slots_of(self.exchange.position))
        self.table_E = tables.put(slot_table(placement))
        self.replica_table_3C = None if rule is None else replica_table(placement)
        self.replicas = None if rule is None else Replicas(*tables.put(self.replica_table_3C))

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor,
                 max_rows: int | None = None) -> DispatchedRows:
        """Send the tokens of a micro-batch to their experts. Waits.

        Args:
            x_TD: [T, D], tokens.
            ids_TK: int64 [T, K], global expert ids; -1 is unused.
            weights_TK: [T, K], gate weights.
            max_rows: bound on the number of used slots (`Routing.max_rows`); None: they are counted.

        Returns:
            The rows that arrived here.
        """
        (plan,) = self.plan([ids_TK], max_rows)
        return self.dispatch_async(x_TD, weights_TK, plan).wait()

    def combine(self, out_RD: Tensor, metadata: CombineMetadata, *, reduce: bool = True) -> Tensor:
        """Send outputs back to their tokens. Waits.

        Args:
            out_RD: [R, D], weighted outputs, ordered by expert.
            metadata: `metadata` of the dispatched rows.
            reduce: sum the outputs of each token.

        Returns:
            [T, D], or with `reduce=False` the output of every slot, [T, K, D].
        """
        return (self.combine_async(out_RD, metadata, read=True).wait() if reduce
                else self._unreduced(out_RD, metadata))

    def plan(self, ids: list[Tensor], max_rows: int | None = None) -> list[DispatchPlan]:
        """Plan the dispatch of each chunk of a micro-batch. Exchanges counts and waits for them.

        Args:
            ids: int64 [T, K] for each chunk, global expert ids; -1 is unused.
            max_rows: bound on the number of used slots (`Routing.max_rows`); None: they are counted.

        Returns:
            A plan for each chunk.
        """
        num_slots, bounds = ids[0].shape[1], [max_rows or 0] * len(ids)
        if max_rows is None:
            ids, bounds = used_columns(ids)
        physical, known = self._assign(ids)                  # calibration may change the placement
        if self.exchange.positions == 1:
            plans = [self._plan_alone(each, rows) for each, rows in zip(physical, bounds)]
        else:
            plans = self._plan_exchange(physical, known, agree_on_width=max_rows is None)
        return [plan._replace(num_slots=num_slots) for plan in plans]

    def _plan_exchange(self, physical: list[Tensor], known: list[Tensor] | None, *,
                       agree_on_width: bool) -> list[DispatchPlan]:
        """Plan chunks whose rows are exchanged. The host waits for the device, once.

        Args:
            physical: int64 [T, K] for each chunk, physical slots.
            known: counts [P, e] of slots that will arrive here, for each chunk; None where they must be
                exchanged.
            agree_on_width: give deduplicated rows the width that the ranks need, instead of K.
        """
        layout, positions = self.layout, self.exchange.positions
        sent_PCw = torch.stack([layout.counts(each, positions, self.slots) for each in physical], dim=1)
        agree_on_width = agree_on_width and isinstance(layout, RowPerRank)
        if agree_on_width:                                   # one more number for each position and chunk
            widths_C = torch.stack([most_at_one_position(each, positions, self.slots) for each in physical])
            sent_PCw = torch.cat([sent_PCw, widths_C[None, :, None].expand(positions, -1, 1)], dim=2)
        if known is not None and isinstance(layout, RowPerSlot):
            received_PCw = torch.stack(known, dim=1)
        else:
            received_PCw = self.exchange.counts(sent_PCw.flatten(1)).view_as(sent_PCw)
        besides_C1 = sent_PCw.new_empty(len(physical), 0)
        if agree_on_width:
            besides_C1 = received_PCw[:, :, -1].amax(0)[:, None]
            sent_PCw, received_PCw = sent_PCw[:, :, :-1], received_PCw[:, :, :-1]
        sent_CP, received_CP = (layout.num_rows(counts_PCw).T for counts_PCw in (sent_PCw, received_PCw))
        received_PCe = layout.num_slots(received_PCw)
        splits, numbers = read_splits(self.exchange, sent_CP, received_CP,
                                      torch.cat([received_PCe.sum(0), besides_C1], dim=1))
        plans = []
        for physical_TK, split, received_Pe, told in zip(physical, splits, received_PCe.unbind(1), numbers,
                                                         strict=True):
            width = max(1, told[self.slots]) if agree_on_width else physical_TK.shape[1]
            sent_rows = layout.order(physical_TK, positions, self.slots, sum(split.sent), width)
            # Other positions may have more slots; counts end with those held here.
            counts_e = received_Pe.sum(0)[:self.held] if self.on_device else told[:self.held]
            plans.append(DispatchPlan(sent_rows, split, received_Pe, sum(told[:self.slots]), counts_e,
                                      physical_TK.shape[1]))
        return plans

    def dispatch_async(self, x_TD: Tensor, weights_TK: Tensor, plan: DispatchPlan) -> PendingDispatch:
        """Start sending the rows of a chunk to their experts. Does not wait.

        Args:
            x_TD: [T, D], tokens of the chunk.
            weights_TK: [T, K], their gate weights.
            plan: plan of the chunk.

        Returns:
            The dispatch under way.
        """
        columns = plan.sent_rows.physical_TK.shape[1]
        weights_TK = weights_TK if columns == plan.num_slots else weights_TK[:, :columns]
        if self.exchange.positions == 1:
            order = plan.sent_rows.permutation
            received = ReceivedRows(
                x_TD, order, (values_of_rows if self.on_device else slot_weights)(weights_TK, order))
            return PendingDispatch(
                self.exchange.post((x_TD,), plan.splits),
                lambda _: DispatchedRows(*received, plan.counts_e, CombineMetadata(plan, None)))
        here = self.exchange.position
        self.remote_rows += sum(plan.splits.sent) - plan.splits.sent[here]
        handle = self.exchange.post(self.layout.pack(x_TD, weights_TK, plan.sent_rows, self.slots),
                                    plan.splits)

        def unpack(tensors: tuple[Tensor, ...]) -> DispatchedRows:
            received = self.layout.unpack(tensors, plan.received_Pe, plan.num_rows)
            return DispatchedRows(*received, plan.counts_e, CombineMetadata(plan, received.order))

        return PendingDispatch(handle, unpack)

    def combine_async(self, out_RD: Tensor, metadata: CombineMetadata, *, read: bool) -> PendingCombine:
        """Start sending the outputs of a chunk back to their tokens. Does not wait.

        Args:
            out_RD: [R, D], weighted outputs, ordered by expert.
            metadata: `metadata` of the dispatched rows.
            read: whether backward reads the outputs (`RoutedExperts`).

        Returns:
            The combine under way.
        """
        plan, order = metadata
        rows_ND = out_RD if order is None else self.layout.pack_outputs(out_RD, order)
        return PendingCombine(self.exchange.post((rows_ND,), plan.splits.reversed(), read=read),
                              plan.sent_rows.permutation, self.on_device)

    def _assign(self, ids: list[Tensor]) -> tuple[list[Tensor], list[Tensor] | None]:
        """Assign the routed slots of each chunk to physical slots.

        Returns:
            Physical slots [T, K] for each chunk, and the counts [P, e] of slots that will arrive here for
            each chunk, or None where they are not known yet.
        """
        if not self.placement.copies and not self.needs_all_counts:
            return [assign(ids_TK, self.table_E) for ids_TK in ids], None
        position, positions = self.exchange.position, self.exchange.positions
        n_CE = torch.stack([count_ids(ids_TK, self.placement.num_experts) for ids_TK in ids])
        if not self.needs_all_counts:
            rule, replicas = self._rule()
            return [spread(ids_TK, rule.split(n_E[None], self.placement, position)[0], replicas)
                    for ids_TK, n_E in zip(ids, n_CE)], None
        n_PCE = self.exchange.counts(
            n_CE.flatten().expand(positions, -1).contiguous()).view(positions, *n_CE.shape)
        n_PCE = read_host(n_PCE)                             # the host waits
        if self.calibrate is not None:
            self.calibrate(n_PCE.sum(1))
        rule, replicas = self._rule()                        # of the placement that calibration may have set
        splits = [rule.split(n_PE, self.placement, 0) for n_PE in n_PCE.unbind(1)]
        return ([spread(ids_TK, to_device(split_PC[position], self.device), replicas)
                 for ids_TK, split_PC in zip(ids, splits)],
                [to_device(self._arriving(split_PC), self.device) for split_PC in splits])

    def _rule(self) -> tuple[SplitRule, Replicas]:
        """The rule and the replicas in force; `set_placement` has checked that copies have them."""
        assert self.rule is not None and self.replicas is not None
        return self.rule, self.replicas

    def _arriving(self, split_PC: Tensor) -> Tensor:
        """Count the slots that arrive here by source and physical slot, int64 [P, e], on the host."""
        assert self.replica_table_3C is not None
        _, position_C, physical_C = self.replica_table_3C
        here_C = position_C == self.exchange.position
        slots_C = physical_C - self.exchange.position * self.slots
        received_Pe = split_PC.new_zeros(self.exchange.positions, self.slots)
        received_Pe[:, slots_C[here_C]] = split_PC[:, here_C]
        return received_Pe

    def _plan_alone(self, physical_TK: Tensor, max_rows: int) -> DispatchPlan:
        """Plan a chunk with one position, where every used slot is a row and stays here."""
        if self.on_device:
            rows = min(max_rows, physical_TK.numel())
            permutation, _ = route_plan(physical_TK, self.slots, rows)
            counts_e = permutation.counts_P[:self.held]
            if rows < physical_TK.numel():                   # without a wait of the host
                torch._assert_async(counts_e.sum() <= rows, f"more used slots than max_rows = {rows}")
        else:
            counts_e = read_host(count_ids(physical_TK, self.slots)).tolist()[:self.held]    # the host waits
            rows = sum(counts_e)
            permutation = plan_permutation(physical_TK, self.slots, rows)
        columns = physical_TK.shape[1]
        return DispatchPlan(SentRows(permutation, physical_TK, columns), Splits((rows,), (rows,)),
                            permutation.counts_P[None], rows, counts_e, columns)

    def _unreduced(self, out_RD: Tensor, metadata: CombineMetadata) -> Tensor:
        """Return the output of every slot, [T, K, D].

        A row comes back for each slot, whatever layout the dispatch had.
        """
        plan, order = metadata
        physical_TK, positions = plan.sent_rows.physical_TK, self.exchange.positions
        permutation = plan.sent_rows.permutation
        if order is not None:
            layout = RowPerSlot()
            sent_1P = layout.counts(physical_TK, positions, self.slots).sum(1)[None]
            received_1P = plan.received_Pe.sum(1)[None]
            (splits,), _ = read_splits(self.exchange, sent_1P, received_1P, sent_1P[:, :0])
            permutation = layout.order(physical_TK, positions, self.slots, sum(splits.sent), 1).permutation
            out_RD = layout.pack_outputs(out_RD, order_by_source(plan.received_Pe, plan.num_rows))
            (out_RD,) = self.exchange.post((out_RD,), splits.reversed()).wait()
        slots_as_tokens = permutation._replace(rows_TK=permutation.rows_TK.view(-1, 1))
        unpermuted = (unpermute_padded if self.on_device else unpermute)(out_RD, slots_as_tokens)
        cut_off = plan.num_slots - physical_TK.shape[1]
        return F.pad(unpermuted.view(*physical_TK.shape, -1), (0, 0, 0, cut_off))


def used_columns(ids: list[Tensor]) -> tuple[list[Tensor], list[int]]:
    """Cut off columns that no token uses. The host waits for their number.

    Args:
        ids: int64 [T, K] for each chunk, used slots first; -1 is unused.

    Returns:
        The columns up to the last used one, at least one, and the number of used slots, for each chunk.
    """
    numbers_K = torch.arange(1, ids[0].shape[1] + 1, device=ids[0].device)
    told = [torch.stack([(used_TK.any(0) * numbers_K).amax(), used_TK.sum()])
            for used_TK in (ids_TK >= 0 for ids_TK in ids)]
    widths, rows = zip(*read_host(torch.stack(told)).tolist())
    return [ids_TK[:, :max(1, width)].contiguous() for ids_TK, width in zip(ids, widths)], list(rows)
