"""Dense layers anywhere give the same on every mesh: a pattern of layers with experts against one process.

float64 to 1e-10: first gradients, clipped; norm; counts exactly; parameters after 3 steps. Pairs of mesh,
activation checkpointing and accumulation, all of them with --all. tests/integration/test_parity.py compares
the same models with an oracle.
"""

from functools import cache
from itertools import product

import pytest
import torch

from tests.support.random_copies import train_with_copies
from tests.support.training import Trained, alone, difference, train_steps, union

PATTERNS = {"every second": ["model.num_layers=4", "model.moe_layers=every_2"],
            "entries of 0": ["model.num_layers=3", "model.num_experts=[8,0,4]", "model.dense_dim=24"]}
MESHES = {
    "single": (1, []), "ddp": (2, ["parallel=ddp"]), "ep": (2, ["parallel=ep"]),
    "fsdp": (2, ["parallel=fsdp"]), "ep_fsdp": (2, ["parallel=ep_fsdp"]),
    "fssdp": (2, ["parallel=fssdp", "parallel.rehome_interval=2"]),
}
# Every pair of a pattern, a way to recompute and an accumulation; fssdp with both patterns.
PAIRS = [
    ("every second", "single", "full", 3), ("entries of 0", "ddp", "selective", 3),
    ("every second", "ep", "none", 3), ("entries of 0", "fsdp", "none", 1),
    ("every second", "ep_fsdp", "full", 1), ("entries of 0", "fssdp", "full", 3),
    ("every second", "fssdp", "selective", 1),
]
STEPS = 3


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        every = list(product(PATTERNS, MESHES, ("none", "selective", "full"), (1, 3)))
        metafunc.parametrize("case", every if metafunc.config.getoption("--all") else PAIRS,
                             ids=lambda case: "-".join(map(str, case)))


def overrides(pattern: str, accumulation: int) -> list[str]:
    return [*PATTERNS[pattern], "train.global_batch=12", "run.dtype=float64", "model.num_shared_experts=1",
            f"train.micro_batch={12 // accumulation}"]


@cache
def truth(pattern: str) -> Trained:
    return alone(overrides(pattern, 1), STEPS)


@pytest.mark.ranks
def test_a_pattern_trains_alike_on_every_mesh(ranks, case) -> None:
    pattern, mesh, recompute, accumulation = case
    world, parallel = MESHES[mesh]
    words = [*overrides(pattern, accumulation), *parallel, f"run.nproc={world}",
             f"train.micro_batch={12 // world // accumulation}",
             f"train.activation_checkpointing={recompute}"]
    if world == 1:
        ours = alone(words, STEPS)
    elif mesh == "fssdp":
        ours = union(ranks(world).run(train_with_copies, words, STEPS, None, 3))
    else:
        ours = union(ranks(world).run(train_steps, words, STEPS))
    expected = truth(pattern)
    for what in ("gradients", "parameters"):
        error, name = difference(getattr(ours, what), getattr(expected, what))
        assert error <= 1e-10, f"{what}: {name} differs by {error:.3g} of its largest value"
    for mine, theirs in zip(ours.metrics, expected.metrics, strict=True):
        for key in ("loss/ce", "loss/total", "loss/balance", "grad_norm"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-10), key
    for counted, wanted in zip(ours.counts, expected.counts, strict=True):
        assert counted.keys() == wanted.keys()
        assert all(torch.equal(counted[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_dense_layers_of_a_pattern_train(pattern) -> None:
    """A layer that is left out of the sums would be equal on all meshes, too."""
    before, after = alone(overrides(pattern, 1), 0), truth(pattern)
    assert after.counts[0].keys() == ({"layers.1.moe", "layers.3.moe"} if pattern == "every second"
                                      else {"layers.0.moe", "layers.2.moe"})
    assert all(not torch.equal(before.parameters[name], after.parameters[name]) for name in after.parameters)
    assert all(gradient.abs().max() > 0 for gradient in after.gradients.values())
