"""Two-level exchange: inside the node first, then to other nodes along rails; few messages leave a node.

Rank l of node n sends a row for (n', l') to (n, l'), the rank of its own node that has the destination's
place, which sends it on to (n', l'). So every rank exchanges with the others of its node and with those of
its own place on other nodes only. Rows that come back take the same way in reverse. This is the 2D all-to-all
of DeepSpeed-MoE and DeepEP.

    there    node exchange, finished at once | rail exchange, under way until it is waited for
    back     rail exchange, under way until it is waited for | node exchange, finished at once

So the slow stage is the one that overlaps with computation. Backward is the same by autograd, as both stages
are flat exchanges. A row for two ranks of another node is two rows on the rail.

Shapes: C exchanges that are planned together, P positions, N nodes, L ranks per node; position = n * L + l; R
rows.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moetrain.comm.exchange.base import Counts, Handle, Splits
from moetrain.comm.exchange.flat import FlatExchange
from moetrain.comm.mesh import Group
from moetrain.ops.permute import reorder
from moetrain.ops.pinned import to_device


class RowReorder(NamedTuple):
    """Reordering of rows and its inverse, int64 [R] each."""

    index_R: Tensor
    inverse_R: Tensor

    def reversed(self) -> "RowReorder":
        return RowReorder(self.inverse_R, self.index_R)

    def of(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Reorder the rows of tensors, with gradients for those of floating point."""
        return tuple(reorder(tensor, *self) if tensor.is_floating_point() else tensor[self.index_R]
                     for tensor in tensors)


class TwoStagePlan(NamedTuple):
    """Plan of both stages.

    Attributes:
        first: splits of the first stage.
        second: splits of the second stage.
        before: reordering before the first stage; None on the way back.
        between: reordering between the stages.
        after: reordering after the second stage; None on the way there.
        returning: whether this is the way back, on which the rail exchange comes first.
    """

    first: Splits
    second: Splits
    before: RowReorder | None
    between: RowReorder
    after: RowReorder | None
    returning: bool = False

    def reversed(self) -> "TwoStagePlan":
        before, after = (order and order.reversed() for order in (self.before, self.after))
        return TwoStagePlan(self.second.reversed(), self.first.reversed(), after, self.between.reversed(),
                            before, not self.returning)


class TwoLevelExchange:
    """Exchange of one layer in two stages.

    Args:
        group: all positions.
        node: positions on this node.
        rail: positions that have this position's place on their nodes.
        device: where rows are reordered.
    """

    def __init__(self, group: Group, node: Group, rail: Group, device: torch.device) -> None:
        assert group.size == node.size * rail.size, (group.ranks, node.ranks, rail.ranks)
        self.flat, self.node, self.rail = FlatExchange(group), FlatExchange(node), FlatExchange(rail)
        self.device = device
        self.positions, self.position = group.size, group.position

    def counts(self, sent_P: Tensor) -> Tensor:
        return self.flat.counts(sent_P)                  # small, and for all chunks at once

    def announce(self, sent_CP: Tensor, received_CP: Tensor) -> Tensor:
        """Exchange inside the node how many rows each rank will send along which rail."""
        nodes, places = self.rail.positions, self.node.positions
        told_LX = sent_CP.view(-1, nodes, places).permute(2, 0, 1).flatten(1).contiguous()
        return self.node.counts(told_LX).view(places, -1, nodes).transpose(0, 1).flatten(1)

    def splits(self, sent: Counts, received: Counts, announced: Counts) -> list[Splits]:
        nodes, places = self.rail.positions, self.node.positions
        sent_CNL = torch.tensor(sent).view(-1, nodes, places)
        passing_CLN = torch.tensor(announced).view(-1, places, nodes)
        return [self._splits(*each) for each in zip(sent, received, sent_CNL, passing_CLN, strict=True)]

    def post(self, tensors: tuple[Tensor, ...], splits: Splits, *, read: bool = True) -> Handle:
        stages = splits.backend_plan
        assert isinstance(stages, TwoStagePlan)
        if stages.before is not None:
            tensors = stages.before.of(tensors)
        if stages.returning:
            landing = self.rail.post(tensors, stages.first, read=read)
            return _TwoStageHandle(landing, lambda rows: self._finish_inside(rows, stages, read))
        passing = self.node.post(tensors, stages.first, read=read).wait()
        return self.rail.post(stages.between.of(passing), stages.second, read=read)

    def _finish_inside(self, rows: tuple[Tensor, ...], stages: TwoStagePlan,
                       read: bool) -> tuple[Tensor, ...]:
        """Run the node exchange of the way back, once the rail exchange has landed."""
        rows = self.node.post(stages.between.of(rows), stages.second, read=read).wait()
        assert stages.after is not None
        return stages.after.of(rows)

    def _splits(self, sent: Sequence[int], received: Sequence[int], sent_NL: Tensor,
                passing_LN: Tensor) -> Splits:
        """Splits of one exchange; `passing_LN`: rows of this node's ranks for each node that pass here."""
        received_NL = torch.tensor(received).view_as(sent_NL)
        first = Splits(tuple(sent_NL.sum(0).tolist()), tuple(passing_LN.sum(1).tolist()))
        second = Splits(tuple(passing_LN.sum(0).tolist()), tuple(received_NL.sum(1).tolist()))
        stages = TwoStagePlan(first, second, before=transposition(sent_NL, self.device),
                              between=transposition(passing_LN, self.device), after=None)
        return Splits(tuple(sent), tuple(received), stages)


class _TwoStageHandle(NamedTuple):
    """Handle of an exchange whose second stage runs when it is waited for."""

    handle: Handle
    then: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]

    def wait(self) -> tuple[Tensor, ...]:
        return self.then(self.handle.wait())


def transposition(counts_AB: Tensor, device: torch.device) -> RowReorder:
    """Reordering of rows that are sorted by (a, b) to (b, a).

    Args:
        counts_AB: int64 [A, B], rows of each (a, b).
        device: where the reordering is used.
    """
    label_AB = torch.arange(counts_AB.shape[1]).repeat(counts_AB.shape[0])
    label_R = label_AB.repeat_interleave(counts_AB.flatten())
    index_R = label_R.argsort(stable=True)
    inverse_R = torch.empty_like(index_R)
    inverse_R[index_R] = torch.arange(len(index_R))
    return RowReorder(*to_device(torch.stack([index_R, inverse_R]), device))
