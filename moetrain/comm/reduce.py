"""Sums over ranks: always sums, never averages, because losses have global denominators (train/objective.py).

For a group of one rank every function is the identity.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.comm.mesh import Group
from moetrain.ops.pinned import to_device


def sum_over(group: Group, tensor: Tensor) -> Tensor:
    """Sum in place over the group and wait."""
    return sum_over_async(group, tensor)()


def sum_over_async(group: Group, tensor: Tensor) -> Callable[[], Tensor]:
    """Start the sum in place; return a function that waits for it and returns the tensor."""
    if group.process_group is None:
        return lambda: tensor
    works = [dist.all_reduce(tensor, group=group.process_group, async_op=True)]

    def wait() -> Tensor:
        for work in works:
            work.wait()
        # Drop the Work objects: gloo keeps the posting module's hooks alive through them, and Python's
        # garbage collector does not see that cycle.
        works.clear()
        return tensor

    return wait


def largest_over(group: Group, value: float) -> float:
    """Largest value of the group's ranks. The host waits for it."""
    return _agreed(group, value, dist.ReduceOp.MAX)


def total_over(group: Group, value: float) -> float:
    """Sum of the values of the group's ranks, in float64. The host waits for it."""
    return _agreed(group, value, dist.ReduceOp.SUM)


def _agreed(group: Group, value: float, op: dist.ReduceOp) -> float:
    if group.process_group is None:
        return value
    tensor = to_device(torch.tensor([value], dtype=torch.float64), _device(group))
    dist.all_reduce(tensor, op=op, group=group.process_group)
    return tensor.item()


def gather_to_first(group: Group, tensor: Tensor) -> list[Tensor] | None:
    """Gather the tensors of all ranks, which have one shape, at position 0; None elsewhere."""
    if group.process_group is None:
        return [tensor]
    parts = [torch.empty_like(tensor) for _ in group.ranks]
    dist.all_gather(parts, tensor, group=group.process_group)
    return parts if group.position == 0 else None


def _device(group: Group) -> torch.device:
    nccl = dist.get_backend(group.process_group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
