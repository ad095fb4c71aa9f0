"""The wire of two levels: inside the node first, then to other nodes along rails, so that a node's link carries few messages.

Rank l of node n sends a row for (n', l') to (n, l'), the rank of its own node that has the destination's place, and that one
sends it on to (n', l'): every rank exchanges with the others of its node and with those of its own place elsewhere, and with
nobody else. What comes back takes the same way in reverse. (The 2D all-to-all of DeepSpeed-MoE and DeepEP.)

    there    node exchange, done at once | rail exchange, on its way until it is waited for
    back     rail exchange, on its way until it is waited for | node exchange, done at once

So what overlaps with computation is the slow leg. Backward is the same by autograd: both stages are flat exchanges. A row for two
ranks of another node is two rows on the rail.

Shapes: C exchanges that are prepared together, P positions, N nodes, L ranks per node; position = n * L + l.
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
    """A change of the order of rows, and its inverse; int64 [R] each."""

    index_R: Tensor
    inverse_R: Tensor

    def reversed(self) -> "RowReorder":
        return RowReorder(self.inverse_R, self.index_R)

    def of(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(reorder(tensor, *self) if tensor.is_floating_point() else tensor[self.index_R] for tensor in tensors)


class TwoStagePlan(NamedTuple):
    """Both stages, with the orders before the first and between the two."""

    first: Splits
    second: Splits
    before: RowReorder | None
    between: RowReorder
    after: RowReorder | None
    returning: bool = False

    def reversed(self) -> "TwoStagePlan":
        before, after = (turn and turn.reversed() for turn in (self.before, self.after))
        return TwoStagePlan(self.second.reversed(), self.first.reversed(), after, self.between.reversed(), before, not self.returning)


class TwoLevelExchange:
    """group: all positions; node: those of this node; rail: those of this place in every node."""

    def __init__(self, group: Group, node: Group, rail: Group, device: torch.device) -> None:
        assert group.size == node.size * rail.size, (group.ranks, node.ranks, rail.ranks)
        self.flat, self.node, self.rail, self.device = FlatExchange(group), FlatExchange(node), FlatExchange(rail), device
        self.positions, self.position = group.size, group.position

    def counts(self, sent_P: Tensor) -> Tensor:
        return self.flat.counts(sent_P)                  # small, and every chunk's at once

    def announce(self, sent_CP: Tensor, received_CP: Tensor) -> Tensor:
        """The ranks of a node tell each other what they will send along which rail."""
        nodes, places = self.rail.positions, self.node.positions
        told_LX = sent_CP.view(-1, nodes, places).permute(2, 0, 1).flatten(1).contiguous()
        return self.node.counts(told_LX).view(places, -1, nodes).transpose(0, 1).flatten(1)

    def splits(self, sent: Counts, received: Counts, announced: Counts) -> list[Splits]:
        nodes, places = self.rail.positions, self.node.positions
        sent_CNL, passing_CLN = torch.tensor(sent).view(-1, nodes, places), torch.tensor(announced).view(-1, places, nodes)
        return [self._splits(*each) for each in zip(sent, received, sent_CNL, passing_CLN, strict=True)]

    def post(self, tensors: tuple[Tensor, ...], splits: Splits, *, read: bool = True) -> Handle:
        stages: TwoStagePlan = splits.backend_plan
        if stages.before is not None:
            tensors = stages.before.of(tensors)
        if stages.returning:
            return _TwoStageHandle(self.rail.post(tensors, stages.first, read=read), lambda rows: self._close(rows, stages, read))
        passing = self.node.post(tensors, stages.first, read=read).wait()
        return self.rail.post(stages.between.of(passing), stages.second, read=read)

    def _close(self, rows: tuple[Tensor, ...], stages: TwoStagePlan, read: bool) -> tuple[Tensor, ...]:
        rows = self.node.post(stages.between.of(rows), stages.second, read=read).wait()
        return stages.after.of(rows)

    def _splits(self, sent: Sequence[int], received: Sequence[int], sent_NL: Tensor, passing_LN: Tensor) -> Splits:
        """passing_LN: rows of this node's ranks for other nodes that pass here."""
        received_NL = torch.tensor(received).view_as(sent_NL)
        first = Splits(tuple(sent_NL.sum(0).tolist()), tuple(passing_LN.sum(1).tolist()))
        second = Splits(tuple(passing_LN.sum(0).tolist()), tuple(received_NL.sum(1).tolist()))
        stages = TwoStagePlan(first, second, transposition(sent_NL, self.device), transposition(passing_LN, self.device), None)
        return Splits(tuple(sent), tuple(received), stages)


class _TwoStageHandle(NamedTuple):
    """An exchange of which something is left to do once it has landed."""

    handle: Handle
    then: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]

    def wait(self) -> tuple[Tensor, ...]:
        return self.then(self.handle.wait())


def transposition(counts_AB: Tensor, device: torch.device) -> RowReorder:
    """Rows that lie by a and then by b, to lie by b and then by a."""
    label_R = torch.arange(counts_AB.shape[1]).repeat(counts_AB.shape[0]).repeat_interleave(counts_AB.flatten())
    index_R = label_R.argsort(stable=True)
    inverse_R = torch.empty_like(index_R)
    inverse_R[index_R] = torch.arange(len(index_R))
    return RowReorder(*to_device(torch.stack([index_R, inverse_R]), device))
