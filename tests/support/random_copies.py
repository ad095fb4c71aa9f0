"""What the tests of FSSDP run on every rank: training with other random copies at every step."""

import random

import pytest
import torch

from moetrain.model.build import ConvertModel
from moetrain.plan.calibration import add_missing_copies
from moetrain.plan.cost.machine import Topology
from moetrain.plan.placement import ExpertPlacement, LayerPlacement
from moetrain.plan.planners.base import LayerPlan
from moetrain.train.state import Run
from tests.support.training import Trained, make_run, train_run

CALIBRATE = "parallel.calibrate=true"


class Random:
    """A planner that copies and moves homes at random, by the loads it is given."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def plan(self, loads, homes, topology, costs, max_copies) -> LayerPlan:
        draw = random.Random(f"{self.seed}/{loads.tolist()}")
        pairs = [(expert, at) for expert, home in enumerate(homes.home)
                 for at in range(homes.positions) if at != home]
        copies = draw.sample(pairs, draw.choice([0, 1, len(pairs) // 3, len(pairs)]))
        placement = LayerPlacement(homes.home, homes.positions, tuple(copies))
        self.rule = draw.choice(["local_first", "waterfill", "shares"])
        return LayerPlan(placement, tuple(draw.choice([0, 1, 7]) for _ in placement.replicas))

    def rehome(self, loads, placement, topology, costs) -> ExpertPlacement:
        """Any home for every expert."""
        draw = random.Random(f"{self.seed}/{[layer.tolist() for layer in loads.values()]}")
        layers = []
        for name, layer in placement.layers:
            home = tuple(draw.randrange(layer.positions) for _ in layer.home)
            layers.append((name, LayerPlacement(home, layer.positions)))
        return ExpertPlacement(tuple(layers))


def run_with_copies(overrides: list[str], forced=None, seed: int = 0,
                    convert_model: ConvertModel | None = None) -> Run:
    """Two ranks a node."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", "2")
        run = make_run(overrides, forced, convert_model)
    planning = run.state.planning
    assert planning.planning_inputs.topology == Topology(run.mesh["ep"].size, 2)
    planning.planner = Random(seed)
    planning.planning_inputs = planning.planning_inputs._replace(max_copies=8)
    # Every missing copy, whatever it costs.
    planning.calibration = planning.calibration and add_missing_copies
    return run


def train_with_copies(overrides: list[str], steps: int, forced, seed: int,
                      convert_model: ConvertModel | None = None) -> Trained:
    run = run_with_copies(overrides, forced, seed, convert_model)
    planning = run.state.planning
    sliced = set()

    def set_placement(placement, tables, original=planning.copies.set_placement):
        sliced.update(layer.sliced for _, layer in placement.layers)
        original(placement, tables)

    planning.copies.set_placement = set_placement
    planning.restored()                                  # copies from the first step on
    trained = train_run(run, steps)
    if run.config.parallel.max_sliced_experts and not forced:
        assert len(sliced) > 2, sliced                   # other experts lie in pieces in mid-run
    return trained


class EveryLayerOtherwise(Random):
    asked = 0

    def plan(self, loads, homes, topology, costs, max_copies) -> LayerPlan:
        self.asked += 1
        return super().plan(loads + self.asked, homes, topology, costs, max_copies)


def numbers(metrics: dict[str, float]) -> dict[str, str]:
    return {name: float(value).hex() for name, value in metrics.items()
            if not name.startswith(("time", "through", "memory"))}


def bits(run: Run) -> dict[str, bytes]:
    return {shard.name: shard.rows.detach().contiguous().view(torch.uint8).numpy().tobytes()
            for shard in run.state.state_shards()}
