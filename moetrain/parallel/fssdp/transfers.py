"""What travels for the copies of one layer, from whole homes and from pieces, as one.

Copies lie in the order of their slots: those from whole homes, then those put together from pieces (plan/placement.py). Each
of the two is a collective of its own (comm/sparse/), posted at once and waited for in this order on every position.

Shapes: c copies here, s rows received for homes here, W numbers of an expert.
"""

import torch
from torch import Tensor

from moetrain.comm.mesh import Group
from moetrain.comm.sparse.base import Collective, Handle
from moetrain.comm.sparse.forms import collective
from moetrain.comm.sparse.sliced import Sliced
from moetrain.moe.bank import MATRICES, PIECES, ExpertBank
from moetrain.ops.pinned import DeviceTables
from moetrain.plan.cost.machine import Topology
from moetrain.plan.placement import LayerPlacement


class PendingDispatch:
    """Copies on their way. `wait` gives their rows [c, W], once."""

    def __init__(self, handles: list[Handle]) -> None:
        self.handles = handles

    def wait(self) -> Tensor:
        rows = [handle.wait() for handle in self.handles]
        return rows[0] if len(rows) == 1 else torch.cat(rows)


class PendingGradReduction:
    """Gradients on their way home. `finish` adds them to those of the parameters there, once."""

    def __init__(self, bank: ExpertBank, parts: list[tuple[Collective, tuple[str, str], Handle]]) -> None:
        self.bank, self.parts = bank, parts

    def finish(self) -> None:
        for part, names, handle in self.parts:
            matrices = [getattr(self.bank, name) for name in names]
            widths = [matrix.shape[1:].numel() for matrix in matrices]
            for matrix, part_sW in zip(matrices, handle.wait().split(widths, dim=1)):
                own = torch.zeros_like(matrix) if matrix.grad is None else matrix.grad
                matrix.grad = part.sum_at_home(own.flatten(1), part_sW).view_as(matrix)


class CopyTransfers:
    """form, topology: of the collectives from whole homes (comm/sparse/forms.py)."""

    def __init__(self, placement: LayerPlacement, bank: ExpertBank, group: Group, form: str, topology: Topology,
                 tables: DeviceTables) -> None:
        self.bank, self.group = bank, group
        self.parts: list[tuple[Collective, tuple[str, str]]] = []        # names: of the parameters that copies come from
        if placement.whole_copies:
            self.parts.append((collective(form, placement, topology, group.position, tables), MATRICES))
        if placement.sliced:
            self.parts.append((Sliced(placement, bank.shapes, group.position, tables), PIECES))
        self.copies = sum(part.copies for part, _ in self.parts)

    def post_gather(self, dtype: torch.dtype) -> PendingDispatch:
        """Start bringing the copies. dtype: on the wire."""
        return PendingDispatch([part.post_gather([getattr(self.bank, name) for name in names], self.group, dtype)
                         for part, names in self.parts])

    def post_reduce(self, gradients_cW: Tensor) -> PendingGradReduction:
        """Start sending the gradients of the copies home."""
        rows = gradients_cW.split([part.copies for part, _ in self.parts])
        return PendingGradReduction(self.bank, [(part, names, part.post_reduce(each, self.group))
                                   for (part, names), each in zip(self.parts, rows)])
