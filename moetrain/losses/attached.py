"""Auxiliary losses injected in backward, by an identity node on the activations.

A loss that is added to the objective needs the place where the cross-entropy is computed, which a pipeline
stage does not have. So the slopes of the same losses (`AuxLoss.slopes`) can be injected instead: forward
passes x through; backward gives x its gradient, and every sum of the statistics its slope. The slopes are
computed in backward, which is as late as an all-reduce of counts can be awaited.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from moetrain.routers.stack import Stack

Slopes = Sequence[Mapping[str, Tensor]]                  # of each stack, by field of RoutingStats


def attach(x: Tensor, stacks: Sequence[Stack], slopes: Callable[[], Slopes]) -> Tensor:
    """Attach the gradients of auxiliary losses to activations.

    Args:
        x: activations of any shape, through which backward passes.
        stacks: statistics of routers, whose sums get the gradients.
        slopes: called once in backward; gradients of the losses with respect to the sums.

    Returns:
        x, as a view.
    """
    sums = {(index, field): tensor for index, stack in enumerate(stacks)
            for field, tensor in stack.stats.named().items() if tensor.requires_grad}
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
