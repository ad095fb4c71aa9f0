"""Gradients of replicated parameters: summed over the ranks that hold them, once per optimizer step.

Summed, never averaged: the loss already carries global denominators. Gradients travel in flat buckets of one dtype, in
parameter order, so the sequence of collectives depends on the config alone; a parameter without a gradient counts as
zeros and gets zeros, on every rank. Sharded parameters are passed over: FSDP2 has summed theirs in the backward pass.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moetrain.comm.mesh import Group
from moetrain.comm.reduce import sum_over_async

BUCKET_BYTES = 32 * 2**20


class GradientReducer:
    """parts: which parameters are summed over which group; every parameter in exactly one part."""

    def __init__(self, parts: Iterable[tuple[list[nn.Parameter], Group]]) -> None:
        self.parts = [(list(parameters), group) for parameters, group in parts]

    @torch.no_grad()
    def reduce(self) -> None:
        """Sum all gradients; all buckets are posted before the first is awaited."""
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
    for parameter, part in zip(bucket, flat.split([parameter.numel() for parameter in bucket])):
        parameter.grad.copy_(part.view_as(parameter))
