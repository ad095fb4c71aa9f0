"""Sums over ranks. Always sums, never averages: losses carry global denominators (see train/objective.py).

A group of one rank is the identity.
"""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.comm.mesh import Group
from moetrain.errors import MoETrainError
from moetrain.ops.pinned import to_device

T = TypeVar("T")

logger = logging.getLogger(__name__)

LOOK_S = 0.5                 # between two looks at each other while one works alone, so that nobody times out


def sum_over(group: Group, tensor: Tensor) -> Tensor:
    """Sum in place over the group and wait."""
    return sum_over_async(group, tensor)()


def sum_over_async(group: Group, tensor: Tensor) -> Callable[[], Tensor]:
    """Start the sum in place; the returned function waits and gives the tensor."""
    if group.process_group is None:
        return lambda: tensor
    works = [dist.all_reduce(tensor, group=group.process_group, async_op=True)]

    def wait() -> Tensor:
        for work in works:
            work.wait()
        works.clear()                                    # gloo's hold the hooks of the block in which they were posted, which hold
        return tensor                                    # whoever holds this function, and no collector sees that ring

    return wait


def largest_over(group: Group, value: float) -> float:
    """The largest value of the group's ranks. The host waits for it."""
    return _agreed(group, value, dist.ReduceOp.MAX)


def total_over(group: Group, value: float) -> float:
    """The sum of the values of the group's ranks, in float64. The host waits for it."""
    return _agreed(group, value, dist.ReduceOp.SUM)


def _agreed(group: Group, value: float, op: dist.ReduceOp) -> float:
    if group.process_group is None:
        return value
    tensor = to_device(torch.tensor([value], dtype=torch.float64), _device(group))
    dist.all_reduce(tensor, op=op, group=group.process_group)
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
    fail_together(group, failure)
    return result


def fail_together(group: Group, failure: MoETrainError | None) -> None:
    """Return where no rank of the group has a failure. Otherwise a rank that has one raises it, the others leave with its code."""
    code = int(largest_over(group, failure.code if failure else 0))
    if failure is not None:
        raise failure
    if code:
        logger.error("another rank cannot go on; log/rank-<n>.log of the run says why")
        raise SystemExit(code)


def on_first(group: Group, action: Callable[[], T]) -> T | None:
    """What `action` gives on the group's first rank, None on the others; waits, however long it takes there.

    It works in a thread of its own while all ranks look at each other, so no collective waits longer than for one look.
    A MoETrainError ends all ranks, as in `all_or_none`.
    """
    if group.process_group is None:
        return action()
    work: Future[T] | None = None
    if group.position == 0:
        work = Future()
        threading.Thread(target=_into, args=(work, action), name="alone", daemon=True).start()
    working = True
    while working:
        if work is not None:
            wait([work], timeout=LOOK_S)
        working = bool(largest_over(group, work is not None and not work.done()))
    return all_or_none(group, lambda: None if work is None else work.result())


def _into(work: Future, action: Callable[[], object]) -> None:
    try:
        work.set_result(action())
    except BaseException as error:                       # raised where the result is asked for
        work.set_exception(error)


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
