"""`TrainState` is complete: whatever a step changes in a run is saved or rebuilt.

The whole run is walked before and after a step.
"""

import random

import numpy as np
import pytest
import torch

from moetrain.train.step import train_step
from tests.support.training import make_run
from tests.support.unsaved_state import unsaved, walk

VARIANTS = {
    "plain": [], "sigmoid": ["router=sigmoid"], "muon": ["optim=muon"], "capacity": ["capacity=position"],
    "accumulated": ["train.micro_batch=4", "train.count_pass=true", "train.activation_checkpointing=full"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_a_step_changes_is_saved_or_rebuilt(variant):
    assert unsaved(make_run(VARIANTS[variant])) == []


def test_the_walk_reaches_every_kind_of_state():
    paths = [path for path, _ in walk(make_run([]), "run", set())]
    for part in ("run.state.model._modules.layers", "exp_avg_sq", "run.state.step", "run.loader",
                 "run.dataset", "run.objective"):
        assert any(part in path for path in paths), part


@pytest.mark.parametrize("forgotten", ["tensor", "counter", "generator", "unsaved buffer", "array"])
def test_forgotten_state_is_found(forgotten):
    run = make_run([])
    router = run.state.model.layers[1].moe.router
    keepers = {
        "tensor": lambda: setattr(router, "ema", torch.rand(3)),
        "counter": lambda: setattr(run.loader, "read", getattr(run.loader, "read", 0) + 1),
        "generator": lambda: torch.rand(
            1, generator=run.objective.__dict__.setdefault("draws", torch.Generator())),
        "unsaved buffer": lambda: router.register_buffer("hidden", torch.rand(3), persistent=False),
        "array": lambda: run.dataset.__dict__.update(window=np.random.rand(3)),
    }
    end_of_step = run.state.model.end_of_step
    run.state.model.end_of_step = lambda *sums: (end_of_step(*sums), keepers[forgotten]())
    assert len(unsaved(run)) == 1


def test_nothing_draws_from_a_global_generator():
    run = make_run(["router=sigmoid"])
    states = lambda: (torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate())  # noqa: E731
    before = states()
    train_step(run, 1)
    assert states() == before
