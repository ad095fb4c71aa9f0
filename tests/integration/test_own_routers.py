"""Routers of one's own train on every mesh as in one process, however a step is run.

    own_starts   parameters and buffers that start at values of their own, a controller, a capacity policy
    hashed       no parameter, no scores
    edited       decisions edited for some tokens

Factors: mesh, activation checkpointing, accumulation, count pass. Pairs here, the product with --all.
"""

from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moetrain.config.compose import compose, for_run
from moetrain.train.evaluation.evaluate_run import evaluate_run
from moetrain.train.loop import train
from moetrain.train.state import Run
from tests.support import own_routers
from tests.support.training import Trained, alone, difference, in_float64, make_run, train_steps, union

STEPS = 2
MESHES = ("single", "ddp", "ep", "fsdp", "ep_fsdp", "fssdp")
ROUTERS = ("own_starts", "hashed", "edited")
PAIRS = [
    ("own_starts", "ddp", "full", 3, True), ("own_starts", "ep", "selective", 3, False),
    ("own_starts", "fsdp", "full", 1, True), ("own_starts", "ep_fsdp", "none", 3, False),
    ("own_starts", "fssdp", "selective", 1, True), ("hashed", "fsdp", "none", 1, False),
    ("edited", "ep", "full", 1, True), ("edited", "fsdp", "selective", 3, False),
    ("edited", "fssdp", "none", 3, True),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        every = product(ROUTERS, MESHES, ("none", "selective", "full"), (1, 3), (False, True))
        cases = list(every) if metafunc.config.getoption("--all") else PAIRS
        metafunc.parametrize("case", cases, ids=lambda case: "-".join(map(str, case)))


@cache
def truth(router: str, steps: int = STEPS) -> Trained:
    return alone(in_float64(), steps, None, getattr(own_routers, router))


@pytest.mark.ranks
def test_a_mesh_trains_as_one_process(ranks, case: tuple[str, str, str, int, bool]) -> None:
    router, mesh, checkpointing, accumulation, count_pass = case
    size, expected = 1 if mesh == "single" else 2, truth(router)
    given = [*in_float64(size, accumulation), f"parallel={mesh}",
             f"train.count_pass={str(count_pass).lower()}", f"train.activation_checkpointing={checkpointing}"]
    convert = getattr(own_routers, router)
    ours = (alone(given, STEPS, None, convert) if size == 1 else
            union(ranks(size).run(train_steps, given, STEPS, None, convert)))
    for mine, other in zip(ours.counts, expected.counts, strict=True):
        assert all(mine[name].equal(other[name]) for name in other)
    for name in ("gradients", "parameters"):
        error, tensor = difference(getattr(ours, name), getattr(expected, name))
        assert error < 1e-10, (name, tensor, error)
    for mine, other in zip(ours.metrics, expected.metrics, strict=True):
        for key in ("loss/ce", "loss/total", "loss/balance", "moe/entropy", "grad_norm"):
            assert mine[key] == pytest.approx(other[key], rel=1e-10), key


def test_each_does_something_of_its_own() -> None:
    plain, start = alone(in_float64(), 1), truth("own_starts", 0).parameters
    for router in ROUTERS:
        assert truth(router).metrics[0]["loss/ce"] != plain.metrics[0]["loss/ce"]
    moved = truth("own_starts").parameters
    for name in ("temperature", "gain", "weight", "rotation"):
        tensor, first = (found[f"layers.1.moe.router.{name}"] for found in (moved, start))
        assert tensor.equal(first) == (name == "rotation"), name
    assert start["layers.0.moe.router.temperature"] == 0.07 and start["layers.0.moe.router.gain"] == 3
    rotation = start["layers.0.moe.router.rotation"]
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(16).double())
    assert not any("router" in name for name in truth("hashed").parameters)
    metrics = truth("hashed").metrics[0]
    assert metrics["moe/entropy"] == pytest.approx(torch.tensor(2.0).log().item())
    assert metrics["loss/balance"] >= 1 and metrics["loss/z"] == 0
    first, second = (truth("edited").counts[0][f"layers.{layer}.moe"] for layer in (0, 1))
    assert first[3] == 0 and first.sum() > second.sum() and second[5] >= first.sum() / 2 / 3


def router_state(run: Run) -> dict[str, torch.Tensor]:
    return {name: buffer for name, buffer in run.state.model.named_buffers()}


@pytest.mark.ranks
def test_buffers_start_alike_on_every_mesh(ranks) -> None:
    (one,) = [router_state(make_run(in_float64(), None, own_routers.own_starts))]
    assert one["layers.0.moe.router.penalty"] == 1e-8 and (one["layers.1.moe.router.prior"] == 5).all()
    assert sorted(one["layers.0.moe.router.order"].tolist()) == list(range(8))
    assert not one["layers.0.moe.router.order"].equal(one["layers.1.moe.router.order"])
    assert one["layers.1.moe.capacity.threshold"].tolist() == [1.5]
    for mesh in ("fsdp", "fssdp"):
        for other in ranks(2).run(started_buffers, [*in_float64(2), f"parallel={mesh}"]):
            assert other.keys() == one.keys() and all(other[name].equal(one[name]) for name in one)


def started_buffers(overrides: list[str]) -> dict[str, torch.Tensor]:
    return router_state(make_run(overrides, None, own_routers.own_starts))


def test_a_run_that_goes_on_has_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    given = ["experiment=debug", "run.steps=4", "model.dim=16", "train.seq_len=8", "train.global_batch=2",
             "eval.windows=1", "run.device=cpu"]
    for name, stops in (("whole", []), ("halves", [2])):
        for stop in [*stops, 4]:
            train(compose([*given, f"run.name={name}", f"run.stop_at={stop}"]),
                  convert_model=own_routers.own_starts)
    whole, halves = (evaluate_run(for_run([f"run.name={name}"]), convert_model=own_routers.own_starts)
                     for name in ("whole", "halves"))
    assert whole.losses == halves.losses
    first, second = (load_file(next((tmp_path / f"runs/{name}/checkpoints").glob("*4/*.safetensors")))
                     for name in ("whole", "halves"))
    assert first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)
    penalty = first["buffer.layers.0.moe.router.penalty"]
    assert penalty.shape == () and penalty > 0 and penalty != torch.tensor(1e-8)
    assert not any("prior" in name or "threshold" in name for name in first)
