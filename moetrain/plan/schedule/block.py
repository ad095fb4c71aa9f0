"""Tasks of one block: dense work, then a sparse layer whose micro-batch runs in chunks.

A chunk passes five stages. Its dispatch goes between nodes first and then inside each node; its outputs
return the same way in reverse:

    D  dispatch, between nodes    G  dispatch, inside nodes (with expert sharding: gather)
    X  experts
    S  combine, inside nodes (with expert sharding: scatter)   C  combine, between nodes

Two orders:

    planned   FSMoE, section 4.1: on the links all dispatches come before the gradient slice, and it before
              all combines; inside nodes a dispatch before a combine where both could run
    streamed  moe/overlap.py, `schedule=fixed`: one stream of exchanges, D0 D1 C0 D2 C1 …, each whole, so the
              two links never carry different chunks at once

Copies of experts (FSSDP) travel from the beginning of the block, and the first experts wait for them. Their
gradients travel home after the gradients of weights. Backward is a block of its own, with its own times.

Times of a collective are those of the rank that takes longest; the caller sees to that.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from moetrain.plan.schedule.simulate import BETWEEN, COMPUTE, INSIDE, Task

Order = Literal["planned", "streamed"]


class ChunkTimes(NamedTuple):
    """Seconds of the stages of one chunk, in their order."""

    dispatch_s: float
    gather_s: float
    experts_s: float
    scatter_s: float
    combine_s: float


class BesideTimes(NamedTuple):
    """Seconds of what runs beside the chunks of a block.

    Attributes:
        dense_s: computation before the first dispatch: attention, norms, router.
        shared_s: computation that waits for nothing but the dense work: the shared expert.
        weights_s: computation after the experts: gradients of weights, in backward.
        gradients_s: reduction of gradients between nodes, begun after the last dispatch.
        copies_between_s: copies of experts from other nodes, begun with the block.
        copies_inside_s: copies of experts inside nodes, after these.
        copy_grads_between_s: their gradients, after `weights_s`.
        copy_grads_inside_s: the same inside nodes, before these.
    """

    dense_s: float = 0.0
    shared_s: float = 0.0
    weights_s: float = 0.0
    gradients_s: float = 0.0
    copies_between_s: float = 0.0
    copies_inside_s: float = 0.0
    copy_grads_between_s: float = 0.0
    copy_grads_inside_s: float = 0.0


def block_tasks(chunks: Sequence[ChunkTimes], beside: BesideTimes = BesideTimes(),
                order: Order = "planned") -> list[Task]:
    """List the tasks of a block in one direction.

    Args:
        chunks: times of the chunks, in order.
        beside: times of what runs beside them.
        order: of the exchanges.
    """
    tasks, last = _Tasks(), 3 * len(chunks)
    dense = tasks.add("dense", COMPUTE, beside.dense_s, rank=-1)
    copies = tasks.add("copies between", BETWEEN, beside.copies_between_s, rank=-1)
    copies = tasks.add("copies inside", INSIDE, beside.copies_inside_s, copies, rank=-1)
    shared = tasks.add("shared expert", COMPUTE, beside.shared_s, dense, rank=last - 1)
    ordered = _planned if order == "planned" else _streamed
    experts = ordered(tasks, chunks, beside.gradients_s, dense, copies)
    weights = tasks.add("weight gradients", COMPUTE, beside.weights_s, *experts, rank=last)
    inside = tasks.add("copy gradients inside", INSIDE, beside.copy_grads_inside_s, weights, rank=last)
    tasks.add("copy gradients between", BETWEEN, beside.copy_grads_between_s, inside, shared, rank=last)
    return tasks.listed


class _Tasks:
    """Tasks in the order in which they were added."""

    def __init__(self) -> None:
        self.listed: list[Task] = []

    def add(self, name: str, resource: str, seconds: float, *after: int, rank: float) -> int:
        """Add a task; returns its index."""
        self.listed.append(Task(name, resource, seconds, after, rank))
        return len(self.listed) - 1


def _planned(tasks: _Tasks, chunks: Sequence[ChunkTimes], gradients_s: float, dense: int,
             copies: int) -> list[int]:
    """Add the stages of chunks in the order of FSMoE; returns the experts of each."""
    number, last = len(chunks), dense
    dispatched, experts = list[int](), list[int]()
    for i, chunk in enumerate(chunks):
        last = tasks.add(f"dispatch {i}", BETWEEN, chunk.dispatch_s, dense, rank=i)
        dispatched.append(tasks.add(f"gather {i}", INSIDE, chunk.gather_s, last, rank=i))
    tasks.add("gradients", BETWEEN, gradients_s, last, rank=number)
    for i, chunk in enumerate(chunks):
        experts.append(tasks.add(f"experts {i}", COMPUTE, chunk.experts_s, dispatched[i], copies, rank=i))
        scatter = tasks.add(f"scatter {i}", INSIDE, chunk.scatter_s, experts[i], rank=number + i)
        tasks.add(f"combine {i}", BETWEEN, chunk.combine_s, scatter, rank=number + 1 + i)
    return experts


def _streamed(tasks: _Tasks, chunks: Sequence[ChunkTimes], gradients_s: float, dense: int,
              copies: int) -> list[int]:
    """Add the stages of chunks in the order of moe/overlap.py; returns the experts of each."""
    number, last = len(chunks), dense
    dispatched, experts = list[int](), list[int]()
    for i in range(number + 1):
        if i < number:                                       # posted before the combine of the chunk before
            last = tasks.add(f"dispatch {i}", BETWEEN, chunks[i].dispatch_s, last, rank=i)
            last = tasks.add(f"gather {i}", INSIDE, chunks[i].gather_s, last, rank=i)
            dispatched.append(last)
        if done := i:
            chunk = chunks[done - 1]
            experts.append(tasks.add(f"experts {done - 1}", COMPUTE, chunk.experts_s, dispatched[done - 1],
                                     copies, rank=done))
            last = tasks.add(f"scatter {done - 1}", INSIDE, chunk.scatter_s, experts[-1], last, rank=done)
            last = tasks.add(f"combine {done - 1}", BETWEEN, chunk.combine_s, last, rank=done)
    tasks.add("gradients", BETWEEN, gradients_s, last, rank=number + 1)
    return experts
