"""K = E: a router whose tokens use none, a few or all of the experts trains alike on every mesh.

Factors: mesh, row layout, chunks, activation checkpointing, accumulation; pairs of them here, the full
product with --all. The truth is one process that is given every slot, used or not.
"""

from functools import cache
from itertools import product

import pytest
import torch

from moetrain.train.step import train_step
from tests.support.relu_router import ReluRouter, use_relu_routers
from tests.support.training import Trained, alone, difference, make_run, train_steps, union

STEPS = 2
BASE = ["run.dtype=float64", "train.global_batch=12", "train.micro_batch=12", "data.min_length=0.5"]
MESHES = {"single": 1, "ddp": 2, "ep": 2, "fsdp": 2, "ep_fsdp": 2, "fssdp": 2, "ep4": 4}
EXCHANGING = ("ep", "ep_fsdp", "fssdp", "ep4")
FACTORS = {"mesh": list(MESHES), "layout": ["rank", "slot"], "chunks": [1, 3],
           "checkpointing": ["none", "selective", "full"], "accumulation": [1, 3]}
# Every pair of values of two factors occurs, where the mesh has chunks and layouts at all.
PAIRS = [
    ("single", "rank", 1, "selective", 3), ("ddp", "rank", 1, "full", 1), ("fsdp", "rank", 1, "none", 3),
    ("ep", "rank", 1, "none", 1), ("ep", "slot", 3, "selective", 3), ("ep", "rank", 3, "full", 1),
    ("ep_fsdp", "rank", 3, "none", 3), ("ep_fsdp", "slot", 1, "full", 1), ("ep4", "rank", 1, "selective", 3),
    ("fssdp", "rank", 1, "full", 3), ("fssdp", "slot", 3, "none", 1), ("fssdp", "rank", 3, "selective", 1),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        every = [case for case in product(*FACTORS.values())
                 if case[0] in EXCHANGING or case[1:3] == ("rank", 1)]
        cases = every if metafunc.config.getoption("--all") else PAIRS
        metafunc.parametrize("case", cases, ids=lambda case: "-".join(map(str, case)))


@cache
def truth() -> Trained:
    """One process that sees no difference between used and unused slots."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReluRouter, "uses_few_slots", False)
        return alone(BASE, STEPS, None, use_relu_routers)


@pytest.mark.ranks
def test_it_trains_as_one_process_that_is_given_every_slot(ranks, case):
    mesh, layout, chunks, checkpointing, accumulation = case
    world = MESHES[mesh]
    overrides = [*BASE, f"parallel={'ep' if mesh == 'ep4' else mesh}", f"run.nproc={world}",
                 f"train.micro_batch={12 // world // accumulation}",
                 *(["schedule=fixed", f"schedule.chunks={chunks}"] if chunks > 1 else []),
                 *(["parallel.exact_combine=true"] if layout == "slot" else []),
                 f"train.activation_checkpointing={checkpointing}"]
    arguments = (overrides, STEPS, None, use_relu_routers)
    ours = alone(*arguments) if world == 1 else union(ranks(world).run(train_steps, *arguments))
    for name in ("gradients", "parameters"):
        error, tensor = difference(getattr(ours, name), getattr(truth(), name))
        assert error < 1e-10, (name, tensor, error)
    for mine, other in zip(ours.metrics, truth().metrics, strict=True):
        assert mine["loss/total"] == pytest.approx(other["loss/total"], rel=1e-12)


def test_tokens_use_none_a_few_and_all_experts():
    seen = set()
    run = make_run(BASE, None, use_relu_routers)
    for block in run.state.model.layers:
        route = block.moe.router.route

        def record(x_TD, context, route=route):
            routing = route(x_TD, context)
            assert routing.max_rows is None
            seen.update((routing.ids_TK >= 0).sum(1).tolist())
            return routing

        block.moe.router.route = record
    train_step(run, 1)
    assert {0, 8} < seen and len(seen) > 3
    assert all(truth().gradients[f"layers.{layer}.moe.router.weight"].any() for layer in (0, 1))
    assert torch.stack([count.sum() for count in truth().counts[0].values()]).min() > 0
