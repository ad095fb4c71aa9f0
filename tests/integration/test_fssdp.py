"""FSSDP equals one process: random copies at every step, whatever holds them and however they come and go.

Every step has another random placement of copies, with rows divided by every kind of rule; float64 to 1e-10: first
gradients, clipped; norm; counts exactly; parameters after 20 steps of AdamW against one process.
"""

import random
from functools import cache
from typing import NamedTuple

import pytest
import torch

from moetrain.plan.costs import Topology
from moetrain.plan.placement import LayerPlacement
from moetrain.plan.split import Everywhere, LocalFirst
from moetrain.train.step import train_step
from tests.integration.training import FORCED, Trained, alone, difference, make_run, snapshot, union

STEPS = 20


class Random:
    """A planner that copies at random, by the loads it is given and how often it was asked."""

    def __init__(self, seed: int) -> None:
        self.seed, self.asked = seed, 0

    def plan(self, loads, homes, topology, costs, room) -> "Plan":
        self.asked += 1
        draw = random.Random(f"{self.seed}/{self.asked}/{loads.tolist()}")
        pairs = [(expert, at) for expert, home in enumerate(homes.home) for at in range(homes.positions) if at != home]
        copies = draw.sample(pairs, draw.choice([0, 1, len(pairs) // 3, len(pairs)]))
        return Plan(LayerPlacement(homes.home, homes.positions, tuple(copies)), draw.choice([LocalFirst, Everywhere]))


class Plan(NamedTuple):
    placement: LayerPlacement
    kind: type

    def rule(self, topology, costs):
        return self.kind(topology)


def train_with_copies(overrides: list[str], steps: int, forced, seed: int) -> Trained:
    run = make_run(overrides, forced)
    planning = run.state.planning
    planning.planner = Random(seed)
    planning.surroundings = planning.surroundings._replace(topology=Topology(run.mesh["ep"].size, 2))
    planning.restored()                                  # copies from the first step on
    metrics, counts, gradients = [], [], {}
    for step in range(1, steps + 1):
        result = train_step(run, step)
        metrics.append(result.metrics)
        counts.append({name: count.clone() for name, count in result.counts.items()})
        if step == 1:
            gradients = snapshot(run, lambda parameter: parameter.grad)
    return Trained(snapshot(run, lambda parameter: parameter.data), gradients, metrics, counts)


@cache
def truth(extra: tuple[str, ...], forced: bool) -> Trained:
    return alone([*extra, "run.dtype=float64"], STEPS, FORCED if forced else None)


CASES = {
    "two": (2, [], 1, False, []),
    "two, empty ranks": (2, [], 2, True, []),
    "four, accumulated": (4, [], 4, False, []),
    "four, empty ranks": (4, [], 1, True, ["parallel.shard=2"]),
    "replicated": (4, ["parallel.ep=2"], 2, False, []),
    "kept graphs gathered again": (2, ["parallel.rematerialize=true"], 4, False, []),
    "four gathered again": (4, ["parallel.rematerialize=true"], 2, True, []),
    "recomputed": (2, ["train.activation_checkpointing=full"], 2, False, []),
    "recomputed and gathered again": (4, ["train.activation_checkpointing=full", "parallel.rematerialize=true"], 2, False, []),
    "selective, count pass": (2, ["train.activation_checkpointing=selective", "train.count_pass=true",
                                  "parallel.rematerialize=true"], 4, False, []),
    "uneven homes": (4, [], 1, False, ["model.num_experts=[7,3]"]),
}


@pytest.mark.ranks
@pytest.mark.parametrize("case", CASES)
def test_copies_change_nothing(ranks, case):
    world, overrides, accumulation, forced, extra = CASES[case]
    overrides = ["parallel=fssdp", *overrides, *extra, "run.dtype=float64", f"run.nproc={world}",
                 f"train.micro_batch={16 // world // accumulation}"]
    ours = union(ranks(world).run(train_with_copies, overrides, STEPS, FORCED if forced else None, len(case)))
    expected = truth(tuple(e for e in extra if e.startswith("model")), forced)
    for what in ("gradients", "parameters"):
        error, name = difference(getattr(ours, what), getattr(expected, what))
        assert error <= 1e-10, f"{what}: {name} differs by {error:.3g} of its largest value"
    for mine, theirs in zip(ours.metrics, expected.metrics):
        for key in ("loss/ce", "loss/total", "loss/balance", "grad_norm"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-10), key
    for mine, theirs in zip(ours.counts, expected.counts):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
