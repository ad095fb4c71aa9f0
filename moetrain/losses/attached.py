"""The carrier `attached`: an identity node on the activations that hands auxiliary gradients to the routers in backward.

A loss that is returned has to be added where the cross-entropy is; a pipeline stage has no such place. So the same slopes
(AuxLoss.slopes) can be injected instead: forward passes x through, backward gives x its gradient and every sum of the
statistics its slope. The slopes are asked for in backward, as late as counts that are still travelling can be awaited.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from moetrain.routers.base import Stack

Slopes = Sequence[Mapping[str, Tensor]]                  # of every stack, by field of RoutingStats


def attach(x: Tensor, stacks: Sequence[Stack], slopes: Callable[[], Slopes]) -> Tensor:
    """x, with a backward that also gives the statistics what `slopes` says then."""
    sums = {(index, field): tensor for index, stack in enumerate(stacks) for field, tensor in stack.stats._asdict().items()
            if tensor is not None and tensor.requires_grad}
    return _Attach.apply(x, slopes, tuple(sums), *sums.values()) if sums else x


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, slopes, names, *sums):
        ctx.slopes, ctx.names = slopes, names
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        slopes = ctx.slopes()
        return grad, None, None, *(slopes[index].get(field) for index, field in ctx.names)
