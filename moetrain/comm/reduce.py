"""Sums over ranks. Always sums, never averages: losses carry global denominators (see train/objective.py).

A group of one rank is the identity.
"""

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.comm.mesh import Group
from moetrain.errors import MoETrainError

T = TypeVar("T")

logger = logging.getLogger(__name__)


def sum_over(group: Group, tensor: Tensor) -> Tensor:
    """Sum in place over the group and wait."""
    return sum_over_async(group, tensor)()


def sum_over_async(group: Group, tensor: Tensor) -> Callable[[], Tensor]:
    """Start the sum in place; the returned function waits and gives the tensor."""
    if group.process_group is None:
        return lambda: tensor
    work = dist.all_reduce(tensor, group=group.process_group, async_op=True)

    def wait() -> Tensor:
        work.wait()
        return tensor

    return wait


def largest_over(group: Group, value: float) -> float:
    """The largest value of the group's ranks."""
    if group.process_group is None:
        return value
    tensor = torch.tensor([value], dtype=torch.float64, device=_device(group))
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group.process_group)
    return tensor.item()


def all_or_none(group: Group, action: Callable[[], T]) -> T:
    """What `action` gives, once it has succeeded on every rank of the group; waits.

    Where it fails with a MoETrainError on one rank, no rank goes on: that one raises it, the others leave with its code.
    """
    failure, result = None, None
    try:
        result = action()
    except MoETrainError as error:
        failure = error
    code = int(largest_over(group, failure.code if failure else 0))
    if failure is not None:
        raise failure
    if code:
        logger.error("another rank cannot go on; log/rank-<n>.log of the run says why")
        raise SystemExit(code)
    return result


def gather_to_first(group: Group, tensor: Tensor) -> list[Tensor] | None:
    """The tensors of all ranks on position 0, in order; None elsewhere. Equal shapes."""
    if group.process_group is None:
        return [tensor]
    parts = [torch.empty_like(tensor) for _ in group.ranks]
    dist.all_gather(parts, tensor, group=group.process_group)
    return parts if group.position == 0 else None


def _device(group: Group) -> torch.device:
    nccl = dist.get_backend(group.process_group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
