"""Transfers of one layer's copies: parameters from homes to copies, and gradients back.

Copies are in the order of their physical slots: first copies of whole experts, then those assembled from
slices (plan/placement.py). Each of the two kinds has a sparse collective of its own (comm/sparse/). Both are
posted together, and every position waits for them in this order.

Shapes: c copies here, s rows received for homes here, W numbers of an expert.
"""

import torch
from torch import Tensor

from moetrain.comm.mesh import Group
from moetrain.comm.sparse.base import Collective, Handle
from moetrain.comm.sparse.forms import collective
from moetrain.comm.sparse.sliced import Sliced
from moetrain.moe.bank import ExpertBank
from moetrain.ops.pinned import DeviceTables
from moetrain.plan.cost.machine import Topology
from moetrain.plan.placement import LayerPlacement


class PendingCopies:
    """Gather of copies under way, from the handles of its collectives."""

    def __init__(self, handles: list[Handle]) -> None:
        self.handles = handles

    def wait(self) -> Tensor:
        """Wait for the copies and return their rows [c, W], in the order of their slots. Once."""
        rows = [handle.wait() for handle in self.handles]
        return rows[0] if len(rows) == 1 else torch.cat(rows)


class PendingGradReduction:
    """Reduction of gradients under way.

    Args:
        bank: experts whose home is here.
        parts: for each collective, the names of the bank's trainable parameters and the handle to wait for.
    """

    def __init__(self, bank: ExpertBank, parts: list[tuple[Collective, tuple[str, ...], Handle]]) -> None:
        self.bank, self.parts = bank, parts

    def finish(self) -> None:
        """Wait, and add what has arrived to the gradients of the parameters. Once."""
        for part, names, handle in self.parts:
            matrices = [self.bank.stacked(name) for name in names]
            widths = [matrix.shape[1:].numel() for matrix in matrices]
            for matrix, part_sW in zip(matrices, handle.wait().split(widths, dim=1)):
                own = torch.zeros_like(matrix) if matrix.grad is None else matrix.grad
                matrix.grad = part.sum_at_home(own.flatten(1), part_sW).view_as(matrix)


class CopyTransfers:
    """Sparse collectives of one layer under one placement.

    Args:
        placement: homes, copies and sliced experts of the layer.
        bank: experts whose home is here.
        group: the positions, `ep`.
        form: form of the collective for whole experts (comm/sparse/forms.py).
        topology: positions and nodes, for that collective.
        tables: where indices are put on the device.
    """

    def __init__(self, placement: LayerPlacement, bank: ExpertBank, group: Group, form: str,
                 topology: Topology, tables: DeviceTables) -> None:
        self.bank, self.group = bank, group
        self.parts: list[tuple[Collective, tuple[str, ...]]] = []    # with the names of the bank's parameters
        if placement.whole_copies:
            self.parts.append((collective(form, placement, topology, group.position, tables), bank.names))
        if placement.sliced:
            self.parts.append((Sliced(placement, bank.shapes, group.position, tables), bank.slices))
        self.copies = sum(part.copies for part, _ in self.parts)
        # Gradients take the same way back; slices of some of the parameters have other widths.
        trained = [name in bank.trainable for name in bank.names]
        self.back = [(part, tuple(name for name, kept in zip(names, trained) if kept))
                     for part, names in self.parts]
        if placement.sliced and not all(trained):
            shapes = [shape for shape, kept in zip(bank.shapes, trained) if kept]
            self.back[-1] = Sliced(placement, shapes, group.position, tables), self.back[-1][1]

    def post_gather(self, dtype: torch.dtype) -> PendingCopies:
        """Start gathering the copies; they travel in `dtype`. Every position of the group calls it."""
        return PendingCopies([
            part.post_gather([self.bank.value(name) for name in names], self.group, dtype)
            for part, names in self.parts])

    def post_reduce(self, gradients_cW: Tensor) -> PendingGradReduction:
        """Start sending the gradients of the copies home. Every position of the group calls it.

        Args:
            gradients_cW: gradients of the trainable parameters, side by side.
        """
        rows = gradients_cW.split([part.copies for part, _ in self.back])
        return PendingGradReduction(self.bank, [
            (part, names, part.post_reduce(each, self.group))
            for (part, names), each in zip(self.back, rows)])
