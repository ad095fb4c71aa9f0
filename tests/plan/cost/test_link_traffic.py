"""Link loads of copies as the time model sees them, against the transfers that are carried out."""

import numpy as np
import pytest
from hypothesis import given, settings

from moetrain.plan.cost.link_traffic import copy_traffic
from moetrain.plan.cost.machine import Costs, Topology
from moetrain.plan.cost.step_time import gather_seconds
from moetrain.plan.placement import LayerPlacement
from moetrain.plan.transfers import STAGES, slice_transfers
from tests.support.random_placements import FEW, layers


def busiest(moved: list[tuple[int, int, float]], topology: Topology) -> tuple[float, float]:
    """Largest sum that a position sends or receives, inside nodes and between, one transfer at a time."""
    loads: dict[tuple[bool, str, int], float] = {}
    for source, to, size in moved:
        same_node = topology.node_of(source) == topology.node_of(to)
        for end in (("sent", source), ("received", to)):
            loads[same_node, *end] = loads.get((same_node, *end), 0) + size
    return tuple(max((size for (where, *_), size in loads.items() if where == same_node), default=0)
                 for same_node in (True, False))


@settings(FEW, max_examples=100)
@given(layers(sliced=True))
def test_copy_traffic_is_what_the_busiest_link_carries(layer):
    placement, topology = layer
    expert_X, position_X = np.array(placement.copies, dtype=np.int64).reshape(-1, 2).T
    for form in STAGES:
        found = copy_traffic(expert_X, position_X, np.array(placement.home), placement.sliced, topology, form)
        stages = [[(source, to, 1) for _, source, to in stage] for stage in STAGES[form](placement, topology)]
        stages[0] += [(source, to, 1 / placement.positions) for _, source, to in slice_transfers(placement)]
        assert found.first == pytest.approx(busiest(stages[0], topology)), form
        assert found.second == pytest.approx(busiest(stages[1] if len(stages) > 1 else [], topology)), form
        assert found.messages == bool(placement.whole_copies) + bool(placement.sliced), form


def test_slices_relieve_a_home_that_every_position_copies():
    everywhere = LayerPlacement((0,), 8, tuple((0, at) for at in range(1, 8)))
    costs = Costs(1.0, 1.0, 100.0, inside=10.0, between=10.0)
    topology = Topology(8, 8)
    assert gather_seconds(everywhere, topology, costs) == 7 * 10
    assert gather_seconds(everywhere.with_sliced((0,)), topology, costs) == 7 / 8 * 10
