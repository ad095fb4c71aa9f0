"""Exact search for the number of chunks of a layer, by the simulator, in each direction by itself.

A number of chunks whose bound is not below the best time found is not simulated. The bound is the larger of
the critical path and the busiest resource.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from moetrain.plan.schedule.block import BesideTimes, ChunkTimes, Order, block_tasks
from moetrain.plan.schedule.cost_curve import CostCurve
from moetrain.plan.schedule.simulate import Timeline, critical_path_s, simulate


class StageCosts(NamedTuple):
    """Cost curves of the stages of a layer.

    Attributes:
        between: of an exchange between nodes, by the bytes that the busiest link carries.
        inside: of an exchange inside nodes, likewise.
        experts: by the rows of the position that computes most.
        shared_factor: factor of computation while bytes move: exchanges take cores, or SMs.
    """

    between: CostCurve
    inside: CostCurve
    experts: CostCurve
    shared_factor: float = 1.0


class LayerLoad(NamedTuple):
    """What a micro-batch makes of a layer, on the busiest link and position.

    Attributes:
        between: bytes of its dispatch, or combine, between nodes.
        gather: bytes of its dispatch inside nodes.
        scatter: bytes of its combine inside nodes.
        rows: rows that the position computes.
    """

    between: float
    gather: float
    scatter: float
    rows: float


class Choice(NamedTuple):
    """The number of chunks that takes least, and what it takes."""

    chunks: int
    timeline: Timeline


def chunk_times(load: LayerLoad, costs: StageCosts, shares: Sequence[float]) -> list[ChunkTimes]:
    """Times of the chunks of a micro-batch.

    Args:
        load: of the whole micro-batch.
        costs: cost curves of the stages.
        shares: share of each chunk, which sum to 1.
    """
    factor = costs.shared_factor if len(shares) > 1 else 1.0
    return [ChunkTimes(costs.between.seconds(share * load.between), costs.inside.seconds(share * load.gather),
                       factor * costs.experts.seconds(share * load.rows),
                       costs.inside.seconds(share * load.scatter),
                       costs.between.seconds(share * load.between)) for share in shares]


def choose_chunks(times_of: Callable[[int], Sequence[ChunkTimes]], most: int,
                  beside: BesideTimes = BesideTimes(), order: Order = "planned") -> Choice:
    """Choose the number of chunks with the least time; of equal ones, the smallest.

    Args:
        times_of: times of the chunks of a micro-batch in so many.
        most: the largest number of chunks.
        beside: times of what runs beside them.
        order: of the exchanges.
    """
    best: Choice | None = None
    for chunks in range(1, most + 1):
        tasks = block_tasks(times_of(chunks), beside, order)
        if best is not None and _bound_s(tasks) >= best.timeline.makespan_s:
            continue
        timeline = simulate(tasks)
        if best is None or timeline.makespan_s < best.timeline.makespan_s:
            best = Choice(chunks, timeline)
    assert best is not None, most
    return best


def _bound_s(tasks: Sequence) -> float:
    busy: dict[str, float] = {}
    for task in tasks:
        busy[task.resource] = busy.get(task.resource, 0.0) + task.seconds
    return max(critical_path_s(tasks), *busy.values())
