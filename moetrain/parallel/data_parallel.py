"""Data parallelism: sum the gradients of replicated parameters over their ranks, once per optimizer step.

Gradients are summed, never averaged: the loss already has global denominators. They travel in flat buckets of
one dtype, in parameter order, so the sequence of collectives depends on the config alone. A parameter without
a gradient gets a gradient of zeros on every rank. Sharded parameters are skipped: FSDP2 has summed their
gradients in backward (fsdp.py). Frozen parameters are not among those given here: zeros for them would make
the optimizer decay them.
"""

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moetrain.comm.mesh import Group
from moetrain.comm.reduce import sum_over_async

BUCKET_BYTES = 32 * 2**20


class Reducer(Protocol):
    """What sums gradients over ranks after the last backward pass of a step."""

    def reduce(self) -> None:
        """Sum all gradients."""


class GradientReducer:
    """Sum of gradients over ranks.

    Args:
        parts: trainable parameters, with the group over which their gradients are summed. Each is in exactly
            one part.
    """

    def __init__(self, parts: Iterable[tuple[list[nn.Parameter], Group]]) -> None:
        self.parts = [(list(parameters), group) for parameters, group in parts]

    @torch.no_grad()
    def reduce(self) -> None:
        """Sum all gradients. Posts all buckets before it waits for the first."""
        posted = []
        for parameters, group in self.parts:
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            if group.size > 1:
                for bucket in _buckets([p for p in parameters if not isinstance(p, DTensor)]):
                    flat = torch.cat([parameter.grad.flatten() for parameter in bucket])
                    posted.append((bucket, sum_over_async(group, flat)))
        for bucket, wait in posted:
            _unflatten(bucket, wait())


def _buckets(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Cut parameters, in order, into buckets of one dtype and of at most `BUCKET_BYTES` or one parameter."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        nbytes = parameter.grad.nbytes
        if bucket and (size + nbytes > BUCKET_BYTES or parameter.grad.dtype != bucket[0].grad.dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += nbytes
    if bucket:
        yield bucket


def _unflatten(bucket: list[nn.Parameter], flat: Tensor) -> None:
    """Copy a summed bucket back into the gradients of its parameters."""
    for parameter, part in zip(bucket, flat.split([parameter.numel() for parameter in bucket])):
        parameter.grad.copy_(part.view_as(parameter))
