"""The wire of two levels: inside the node first, then to other nodes along rails, so that a node's link carries few messages.

Rank l of node n sends a row for (n', l') to (n, l'), the rank of its own node that has the destination's place, and that one
sends it on to (n', l'): every rank exchanges with the others of its node and with those of its own place elsewhere, and with
nobody else. What comes back takes the same way the other way round. (The 2D all-to-all of DeepSpeed-MoE and DeepEP.)

    there    node exchange, done at once | rail exchange, on its way until it is waited for
    back     rail exchange, on its way until it is waited for | node exchange, done at once

So what overlaps with computation is the slow leg. Backward is the same by autograd: both legs are flat exchanges. A row for two
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


class Turn(NamedTuple):
    """A change of the order of rows, and its inverse; int64 [R] each."""

    index_R: Tensor
    inverse_R: Tensor

    def reversed(self) -> "Turn":
        return Turn(self.inverse_R, self.index_R)

    def of(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(reorder(tensor, *self) if tensor.is_floating_point() else tensor[self.index_R] for tensor in tensors)


class Legs(NamedTuple):
    """Both legs, with the orders before the first and between the two."""

    first: Splits
    second: Splits
    before: Turn | None
    between: Turn
    after: Turn | None
    returning: bool = False

    def reversed(self) -> "Legs":
        before, after = (turn and turn.reversed() for turn in (self.before, self.after))
        return Legs(self.second.reversed(), self.first.reversed(), after, self.between.reversed(), before, not self.returning)


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
        legs: Legs = splits.way
        if legs.before is not None:
            tensors = legs.before.of(tensors)
        if legs.returning:
            return _Later(self.rail.post(tensors, legs.first, read=read), lambda rows: self._close(rows, legs, read))
        passing = self.node.post(tensors, legs.first, read=read).wait()
        return self.rail.post(legs.between.of(passing), legs.second, read=read)

    def _close(self, rows: tuple[Tensor, ...], legs: Legs, read: bool) -> tuple[Tensor, ...]:
        rows = self.node.post(legs.between.of(rows), legs.second, read=read).wait()
        return legs.after.of(rows)

    def _splits(self, sent: Sequence[int], received: Sequence[int], sent_NL: Tensor, passing_LN: Tensor) -> Splits:
        """passing_LN: rows of this node's ranks for other nodes that pass here."""
        received_NL = torch.tensor(received).view_as(sent_NL)
        first = Splits(tuple(sent_NL.sum(0).tolist()), tuple(passing_LN.sum(1).tolist()))
        second = Splits(tuple(passing_LN.sum(0).tolist()), tuple(received_NL.sum(1).tolist()))
        legs = Legs(first, second, turned(sent_NL, self.device), turned(passing_LN, self.device), None)
        return Splits(tuple(sent), tuple(received), legs)


class _Later(NamedTuple):
    """An exchange of which something is left to do once it has landed."""

    handle: Handle
    then: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]

    def wait(self) -> tuple[Tensor, ...]:
        return self.then(self.handle.wait())


def turned(counts_AB: Tensor, device: torch.device) -> Turn:
    """Rows that lie by a and then by b, to lie by b and then by a."""
    label_R = torch.arange(counts_AB.shape[1]).repeat(counts_AB.shape[0]).repeat_interleave(counts_AB.flatten())
    index_R = label_R.argsort(stable=True)
    inverse_R = torch.empty_like(index_R)
    inverse_R[index_R] = torch.arange(len(index_R))
    return Turn(*to_device(torch.stack([index_R, inverse_R]), device))
