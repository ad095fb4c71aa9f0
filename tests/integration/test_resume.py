"""Resuming gives the same bits, and would not if one item of state were forgotten.

Every case trains on, saves, loads into a fresh run and goes on. All numbers of the remaining steps and every
piece of state at the end are compared. The negative controls put back, after the load, one item as a fresh
run has it.
"""

from pathlib import Path

import pytest
import torch

from moetrain.train.checkpoint.load import load
from moetrain.train.checkpoint.save import save
from moetrain.train.state import Run
from moetrain.train.step import train_step
from tests.support.training import make_run

BEFORE, AFTER = 4, 4
TIMED = ("time", "throughput/", "memory/")
BASE = ["run.steps=8", "optim.lr=3e-2", "data.min_length=0.4"]
VARIANTS = {
    "adamw": [], "muon": ["optim=muon"], "sigmoid": ["router=sigmoid", "router.update_rate=0.01"],
    "float64": ["run.dtype=float64"], "bfloat16": ["run.dtype=bfloat16"],
    "accumulated": ["train.micro_batch=4", "train.count_pass=true", "train.activation_checkpointing=full"],
    "wsd": ["optim.schedule=wsd"], "shared": ["model.num_shared_experts=1", "loss=[z]"],
}
# What is forgotten -> the variant that must notice: a pattern of names in TrainState.state_shards, or a
# counter.
FORGOTTEN = {
    "model.embed": "adamw", "model.layers.0.attention.qkv.weight": "adamw",
    "model.layers.1.moe.router.weight": "adamw",
    "model.layers.1.moe.experts.5.down": "adamw", "model.norm.weight": "adamw",
    "model.layers.0.moe.shared.down.weight": "shared",
    ".exp_avg": "adamw", ".exp_avg_sq": "adamw", "experts.3.gate_up.exp_avg": "adamw",
    "momentum_buffer": "muon", "buffer.layers.1.moe.router.bias": "sigmoid", "counter step": "adamw",
    "counter tokens": "adamw", "optimizer step": "adamw",
}


def steps(run: Run, first: int, last: int) -> list[dict]:
    found = []
    for step in range(first, last + 1):
        metrics = train_step(run, step).metrics
        found.append({name: float(value).hex()
                      for name, value in metrics.items() if not name.startswith(TIMED)})
    return found


def end(run: Run) -> dict[str, bytes]:
    return {shard.name: shard.rows.detach().contiguous().view(torch.uint8).numpy().tobytes()
            for shard in run.state.state_shards()}


def resumed(overrides: list[str], directory: Path, forget: str = "") -> tuple[list[dict], dict[str, bytes]]:
    run = make_run(overrides)
    steps(run, 1, BEFORE)
    path = save(run.state, directory, run.mesh, {"data": run.dataset.fingerprint})
    again, fresh = make_run(overrides), make_run(overrides)
    load(again.state, path)
    for shard, untouched in zip(again.state.state_shards(), fresh.state.state_shards()):
        if forget and (shard.name == forget or shard.name.endswith(forget)):
            assert not torch.equal(shard.rows, untouched.rows), f"{shard.name} has not changed in training"
            shard.rows.copy_(untouched.rows)
    if forget == "optimizer step":
        for state in again.state.optimizer.state.values():
            state["step"].fill_(1)                       # what torch's own helpers leave behind
    first = 1 if forget == "counter step" else BEFORE + 1
    again.state.tokens *= forget != "counter tokens"
    return steps(again, first, first + AFTER - 1), end(again)


@pytest.fixture(scope="module")
def unbroken():
    known: dict[str, tuple] = {}

    def get(variant: str):
        if variant not in known:
            run = make_run([*BASE, *VARIANTS[variant]])
            known[variant] = steps(run, 1, BEFORE + AFTER)[BEFORE:], end(run)
        return known[variant]

    return get


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_is_the_unbroken_one_to_the_last_bit(unbroken, tmp_path, variant):
    assert resumed([*BASE, *VARIANTS[variant]], tmp_path) == unbroken(variant)


@pytest.mark.parametrize("item", FORGOTTEN)
def test_forgetting_one_item_shows(unbroken, tmp_path, item):
    metrics, state = resumed([*BASE, *VARIANTS[FORGOTTEN[item]]], tmp_path, forget=item)
    truth = unbroken(FORGOTTEN[item])
    assert metrics != truth[0]
    assert item == "counter tokens" or state != truth[1]
