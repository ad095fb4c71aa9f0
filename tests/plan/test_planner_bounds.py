"""Every planner of every option plans whatever the rules of the config let through.

A bound that a planner has and does not declare (BOUNDS) shows here as an exception: numbers of experts,
positions, nodes and copies that fit each other badly, loads of nothing, and a planner's own whole numbers.
"""

import warnings
from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest

from moetrain.config.bounds import parse
from moetrain.config.build import arguments, build
from moetrain.config.groups import config_dir, group_options
from moetrain.config.yaml_file import load
from moetrain.plan.cost.machine import Costs, Topology
from moetrain.plan.placement import ExpertPlacement, LayerPlacement, contiguous
from moetrain.plan.planners.base import SupportsRehoming

COSTS = Costs(row_s=1e-6, row_bytes=64, expert_bytes=4096, inside=1e9, between=1e7, latency_s=2e-4,
              hidden_s=1e-3)
SIZES = [(experts, positions, per_node) for experts, positions, per_node in product(
    (1, 3, 4, 6), (1, 2, 3), (1, 2)) if per_node <= positions]


def nodes_of(option: str, experts: int) -> Iterator[dict]:
    """The part of an option, and the same with 3 where a whole number may be 3."""
    node = load(config_dir() / "planner" / f"{option}.yaml")
    yield node
    for name, key in arguments(node["_target_"], "planner").items():
        bounds = parse(key.bounds) if key.type is int and key.bounds else None
        if bounds and bounds.hold(3) and not (bounds.divides and experts % 3):
            yield {**node, name: 3}


def loads_of(experts: int, topology: Topology, draw: np.random.Generator) -> Iterator[np.ndarray]:
    yield np.zeros(experts, dtype=np.int64)
    yield np.eye(1, experts, experts // 2, dtype=np.int64)[0]
    yield draw.integers(0, 50, (topology.nodes, experts))


@pytest.mark.parametrize("option", group_options()["planner"])
def test_a_planner_plans_what_the_rules_let_through(option: str) -> None:
    draw = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for experts, positions, per_node in SIZES:
            topology = Topology(positions, per_node)
            anywhere = LayerPlacement(tuple(draw.integers(0, positions, experts).tolist()), positions)
            for node in nodes_of(option, experts):
                planner = build(node, "planner")
                for loads, max_copies in product(loads_of(experts, topology, draw), (1, experts)):
                    homes = anywhere if max_copies == 1 else contiguous(experts, positions)
                    plan = planner.plan(loads, homes, topology, COSTS, max_copies)
                    assert plan.placement.home == homes.home
                    if isinstance(planner, SupportsRehoming):
                        moved = planner.rehome({"a": loads, "b": loads}, ExpertPlacement(
                            (("a", homes), ("b", homes))), topology, {"a": COSTS, "b": COSTS})
                        assert all(set(layer.home) <= set(range(positions)) for _, layer in moved.layers)
