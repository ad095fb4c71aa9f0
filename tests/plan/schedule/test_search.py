"""The search for a number of chunks is exact, in each direction."""

from itertools import pairwise

import numpy as np
import pytest

from moetrain.plan.schedule.block import BesideTimes, block_tasks
from moetrain.plan.schedule.cost_curve import CostLine, CostTable
from moetrain.plan.schedule.search import LayerLoad, StageCosts, choose_chunks, chunk_times
from moetrain.plan.schedule.simulate import simulate

COSTS = StageCosts(CostLine(2e-4, 1e-9), CostLine(5e-5, 1e-10),
                   CostTable((64, 1024, 8192), (4e-4, 9e-4, 6e-3)), 1.1)


@pytest.mark.parametrize("order", ["planned", "streamed"])
@pytest.mark.parametrize("beside", [
    BesideTimes(), BesideTimes(1e-3, 5e-4, 2e-3, 3e-3, 1e-3, 2e-4, 1e-3, 2e-4)], ids=["alone", "beside"])
def test_the_search_equals_trying_every_number(order, beside):
    draw = np.random.default_rng(2)
    for _ in range(25):
        size = 10 ** draw.uniform(3, 7)
        load = LayerLoad(size, size * draw.uniform(0, 8), size * draw.uniform(0, 8), 10 ** draw.uniform(1, 4))

        def times_of(chunks, load=load):
            cuts = [257 * i // chunks for i in range(chunks + 1)]
            return chunk_times(load, COSTS, [(end - begin) / 257 for begin, end in pairwise(cuts)])

        tried = [simulate(block_tasks(times_of(r), beside, order)).makespan_s for r in range(1, 17)]
        found = choose_chunks(times_of, 16, beside, order)
        assert found.chunks == 1 + int(np.argmin(tried)) and found.timeline.makespan_s == min(tried)


def test_directions_may_differ():
    """The experts of backward take twice as long, and its exchanges do not."""
    load = LayerLoad(4e6, 0, 0, 8000)
    costs = StageCosts(CostLine(1e-3, 1e-9), CostLine(0, 0), CostLine(0, 2e-6))
    twice = costs._replace(experts=CostLine(0, 4e-6))
    chunks = [choose_chunks(lambda r, each=each: chunk_times(load, each, [1 / r] * r), 16).chunks
              for each in (costs, twice)]
    assert chunks[0] != chunks[1]
