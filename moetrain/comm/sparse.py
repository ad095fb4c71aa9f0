"""Sparse collectives over a placement: experts from their homes to where copies are wanted, and gradients back.

    sparse all-gather       every position gets the experts that the placement copies to it        spAG
    sparse reduce-scatter   the gradients of all copies are summed at the home                      spRS

(Hecate, arXiv 2502.02581, section 3.) Each is one uneven all-to-all: a home sends by destination and then by expert, so
what a position receives lies by home and then by expert, which is the order of its copies' slots (plan/placement.py). The
receive buffer of the gather is the weights of the copies, and their gradient is the send buffer of the reduction: only
homes pack and sum.

`post_gather` and `post_reduce` start a collective and return a handle that is waited for once. Sums run over positions in
ascending order, the home's own part in its place, whatever arrives first: float32 or better, the same bits every time.
`sparse_all_gather` is the differentiable pair as mathematics has it: the reference, and the oracle of tests.

Shapes: h homes here, c copies here, s experts sent (once for each destination), W numbers of an expert.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.comm.mesh import Group
from moetrain.plan.placement import LayerPlacement


class Lanes(NamedTuple):
    """What one position sends and receives under a placement. The reduction takes the same lanes the other way."""

    position: int
    index_s: Tensor              # int64: which home (its index here) is sent, by destination and then by expert
    sent: tuple[int, ...]        # experts to each position
    received: tuple[int, ...]    # experts from each position

    @property
    def copies(self) -> int:
        return sum(self.received)


def lanes(placement: LayerPlacement, position: int, device: torch.device) -> Lanes:
    """The lanes of a position."""
    index = {expert: row for row, expert in enumerate(placement.experts_of(position))}
    towards = [[index[expert] for expert in placement.copies_at(to) if expert in index] for to in range(placement.positions)]
    here = [placement.home[expert] for expert in placement.copies_at(position)]
    return Lanes(position, torch.tensor(sum(towards, []), dtype=torch.int64, device=device), tuple(map(len, towards)),
                 tuple(here.count(at) for at in range(placement.positions)))


class Flight:
    """A collective under way. `wait` gives the rows received, once."""

    def __init__(self, message: Tensor, sent: tuple[int, ...], received: tuple[int, ...], group: Group) -> None:
        self.message = message                           # kept alive until it has been sent
        self.result: Tensor | None = message.new_empty(sum(received), message.shape[1])
        self.work = dist.all_to_all_single(self.result, message, list(received), list(sent), group=group.process_group,
                                           async_op=True)

    def wait(self) -> Tensor:
        assert self.result is not None, "a collective is taken once"
        self.work.wait()
        result, self.result, self.message = self.result, None, None
        return result


def post_gather(homes: Sequence[Tensor], lanes: Lanes, group: Group, dtype: torch.dtype | None = None) -> Flight:
    """Start bringing copies: rows [c, W]. Every position of the group calls it.

    homes: tensors [h, …] that travel side by side as one row for each expert. dtype: on the wire, theirs when None.
    """
    message_sW = torch.cat([tensor[lanes.index_s].flatten(1) for tensor in homes], dim=1)
    return Flight(message_sW if dtype is None else message_sW.to(dtype), lanes.sent, lanes.received, group)


def post_reduce(gradients_cW: Tensor, lanes: Lanes, group: Group) -> Flight:
    """Start sending the gradients of copies home: rows [s, W], for `sum_at_home`. Every position of the group calls it."""
    return Flight(gradients_cW, lanes.received, lanes.sent, group)


def sum_at_home(own_hW: Tensor, received_sW: Tensor, lanes: Lanes) -> Tensor:
    """Own gradients and those of the copies, summed over positions in ascending order: [h, W]."""
    total_hW = torch.zeros_like(own_hW)
    first = 0
    for position, count in enumerate(lanes.sent):
        if position == lanes.position:
            total_hW += own_hW
        elif count:                                      # an expert goes to a position once: no two rows of one index
            rows = slice(first, first + count)
            total_hW.index_add_(0, lanes.index_s[rows], received_sW[rows])
        first += count
    return total_hW


def sparse_all_gather(homes_hW: Tensor, lanes: Lanes, group: Group) -> Tensor:
    """Weights of all slots here, [h + c, W]: homes, then copies. Its gradient is the sparse reduce-scatter. Waits."""
    return _SparseAllGather.apply(homes_hW, lanes, group)


class _SparseAllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, homes_hW, lanes, group):
        ctx.lanes, ctx.group = lanes, group
        return torch.cat([homes_hW, post_gather([homes_hW], lanes, group).wait()])

    @staticmethod
    def backward(ctx, grad_W):
        own_hW, copies_cW = grad_W.split([len(grad_W) - ctx.lanes.copies, ctx.lanes.copies])
        received_sW = post_reduce(copies_cW.contiguous(), ctx.lanes, ctx.group).wait()
        return sum_at_home(own_hW, received_sW, ctx.lanes), None, None
