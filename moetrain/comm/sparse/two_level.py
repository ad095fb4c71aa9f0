"""Two-level sparse collective: what goes to another node crosses once, to a leader that passes it on there.

    gather     homes -> copies on their node, and one leader on each other node that has copies -> the rest of
               that node
    reduce     the same way back: a leader sums its node's gradients and sends one row home

These are two uneven all-to-alls, of which the second carries what the first has brought. It starts when the
handle is waited for, so other work hides the first alone. Where no leader has anything to pass on, there is
only the first.

Sums have two levels too: over the positions of each node in ascending order, then over nodes in ascending
order. The home's own part has its place in the sum of its node.

Shapes: h homes here, c copies here: a that come from their homes, r passed on by leaders; s experts that
homes here send (once for each destination), W numbers of an expert.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moetrain.comm.mesh import Group
from moetrain.comm.sparse.base import AsyncAllToAll, Handle, add_ascending, arrivals, message, send_plan
from moetrain.ops.pinned import DeviceTables
from moetrain.plan.cost.machine import Topology
from moetrain.plan.placement import LayerPlacement
from moetrain.plan.transfers import two_level


class TwoStageAllToAll:
    """Two all-to-alls, the first of them under way. `wait` returns the rows that both have brought, once.

    Args:
        first: the first, under way.
        carry_on: starts the second from the rows of the first.
        together: joins the rows of both.
    """

    def __init__(self, first: AsyncAllToAll, carry_on: Callable[[Tensor], AsyncAllToAll],
                 together: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.first, self.carry_on, self.together = first, carry_on, together

    def wait(self) -> Tensor:
        brought = self.first.wait()
        return self.together(brought, self.carry_on(brought).wait())


class TwoLevel:
    """Sparse collective of one position in the form `two_level`; see `Collective`."""

    def __init__(self, placement: LayerPlacement, topology: Topology, position: int,
                 tables: DeviceTables) -> None:
        across, inside = two_level(placement, topology)
        copies, positions = placement.copies_at(position), placement.positions
        direct, passed_on = arrivals(across, position), arrivals(inside, position)
        self.topology, self.position = topology, position
        self.copies, self.relayed = len(copies), bool(inside)
        self.across = send_plan(across, position, positions, placement.experts_of(position), tables)
        self.inside = send_plan(inside, position, positions, direct, tables)
        slots_a, slots_r = ([copies.index(expert) for expert in experts] for experts in (direct, passed_on))
        self.slots_a = tables.put(torch.tensor(slots_a, dtype=torch.int64))
        self.slots_r = tables.put(torch.tensor(slots_r, dtype=torch.int64))

    def post_gather(self, homes: Sequence[Tensor], group: Group, dtype: torch.dtype | None = None) -> Handle:
        rows_sW = message(homes, self.across.index_s, dtype)
        first = AsyncAllToAll(rows_sW, self.across.sent, self.across.received, group)
        if not self.relayed:                             # all come from their homes, in the order of slots
            return first
        return TwoStageAllToAll(first, lambda rows_aW: self._pass_on(rows_aW, group), self._in_slots)

    def post_reduce(self, gradients_cW: Tensor, group: Group) -> Handle:
        if not self.relayed:
            return self._homewards(gradients_cW, group)
        own_aW = gradients_cW[self.slots_a]
        first = AsyncAllToAll(gradients_cW[self.slots_r], self.inside.received, self.inside.sent, group)
        return TwoStageAllToAll(
            first, lambda received: self._homewards(self._sum_at_leader(own_aW, received), group),
            lambda _, received_sW: received_sW)

    def sum_at_home(self, own_hW: Tensor, received_sW: Tensor) -> Tensor:
        total_hW = torch.zeros_like(own_hW)
        for node in range(self.topology.nodes):
            here = node == self.topology.node_of(self.position)
            # From another node one row has come for each expert, which is the sum of that node.
            node_hW = torch.zeros_like(own_hW) if here else total_hW
            add_ascending(node_hW, own_hW, received_sW, self.across, self.topology.positions_of(node))
            if here:
                total_hW += node_hW
        return total_hW

    def _pass_on(self, rows_aW: Tensor, group: Group) -> AsyncAllToAll:
        return AsyncAllToAll(rows_aW[self.inside.index_s], self.inside.sent, self.inside.received, group)

    def _in_slots(self, rows_aW: Tensor, rows_rW: Tensor) -> Tensor:
        """Lay the copies from homes and from leaders in the order of slots: [c, W]."""
        rows_cW = rows_aW.new_empty(self.copies, rows_aW.shape[1])
        rows_cW[self.slots_a], rows_cW[self.slots_r] = rows_aW, rows_rW
        return rows_cW

    def _sum_at_leader(self, own_aW: Tensor, received_W: Tensor) -> Tensor:
        """Sum own gradients and those of the copies that were passed on from here: [a, W]."""
        total_aW = torch.zeros_like(own_aW)
        add_ascending(total_aW, own_aW, received_W, self.inside, range(self.topology.positions))
        return total_aW

    def _homewards(self, rows_aW: Tensor, group: Group) -> AsyncAllToAll:
        return AsyncAllToAll(rows_aW, self.across.received, self.across.sent, group)
