"""Packed sparse collective: every copy directly from its home, in one uneven all-to-all.

A home sends by destination and then by expert. So what a position receives is ordered by home and then by
expert, which is the order of its copies' slots (plan/placement.py). The receive buffer of the gather is the
matrices of the copies, and their gradient is the send buffer of the reduction: only homes pack and sum.

Sums run over positions in ascending order, with the home's own part at its place.

Shapes: h homes here, c copies here, s experts sent (once for each destination), W numbers of an expert.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moetrain.comm.mesh import Group
from moetrain.comm.sparse.base import AsyncAllToAll, add_ascending, message, send_plan
from moetrain.ops.pinned import DeviceTables
from moetrain.plan.cost.machine import Topology
from moetrain.plan.placement import LayerPlacement
from moetrain.plan.transfers import packed


class Packed:
    """Sparse collective of one position in the form `packed`; see `Collective`."""

    def __init__(self, placement: LayerPlacement, topology: Topology, position: int,
                 tables: DeviceTables) -> None:
        (stage,) = packed(placement, topology)
        self.copies = len(placement.copies_at(position))
        self.send_plan = send_plan(
            stage, position, placement.positions, placement.experts_of(position), tables)

    def post_gather(self, homes: Sequence[Tensor], group: Group,
                    dtype: torch.dtype | None = None) -> AsyncAllToAll:
        plan = self.send_plan
        return AsyncAllToAll(message(homes, plan.index_s, dtype), plan.sent, plan.received, group)

    def post_reduce(self, gradients_cW: Tensor, group: Group) -> AsyncAllToAll:
        return AsyncAllToAll(gradients_cW, self.send_plan.received, self.send_plan.sent, group)

    def sum_at_home(self, own_hW: Tensor, received_sW: Tensor) -> Tensor:
        total_hW = torch.zeros_like(own_hW)
        add_ascending(total_hW, own_hW, received_sW, self.send_plan, range(len(self.send_plan.sent)))
        return total_hW
