"""Sparse layers of one's own: every mesh equals one process.

    pass_twice          a bank that two routers of a layer feed
    one_bank            a bank that the routers of all layers feed
    surround            wrappers: a gated shared expert, a dense mixture, a latent projection, a hook
    add_null_choices    choices that are no experts: an identity, a zero, a constant
    route_attention     a second sparse layer in every block, in place of its attention

float64 to 1e-10: first gradients, clipped; norm and losses; counts exactly; parameters after 4 steps. Under
`fssdp` other random copies are in force at every step. Each case is a tuple of the conversion, the mesh,
activation checkpointing and accumulation; the full product runs with --all.
"""

import json
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from moetrain.config.compose import compose, for_run
from moetrain.report.loads import read_loads
from moetrain.report.run import draw
from moetrain.train.evaluation.evaluate_run import evaluate_run
from moetrain.train.loop import train
from moetrain.train.step import train_step
from tests.support import sparse_layers
from tests.support.random_copies import CALIBRATE, train_with_copies
from tests.support.training import Trained, alone, difference, make_run, train_run, train_steps, union

STEPS = 4
MESHES = {"single": (1, []), "ddp": (2, ["parallel=ddp"]), "ep": (2, ["parallel=ep"]),
          "fsdp": (2, ["parallel=fsdp"]), "ep_fsdp": (4, ["parallel=ep_fsdp", "parallel.ep=2"]),
          "fssdp": (2, ["parallel=fssdp"])}


CONVERSIONS = ("pass_twice", "one_bank", "surround", "add_null_choices", "route_attention")


class Case(NamedTuple):
    """One training: what is converted, where, and how its passes are run."""

    convert: str
    mesh: str
    checkpointing: str = "none"
    accumulation: int = 1
    more: tuple[str, ...] = ()


PAIRS = [
    Case("pass_twice", "single", "full", 4),
    Case("pass_twice", "ep", "full", 1),
    Case("pass_twice", "ep", "none", 2, ("schedule=fixed", "schedule.chunks=3", "parallel.exchange=peer")),
    Case("pass_twice", "fsdp", "selective", 2),
    Case("pass_twice", "ep_fsdp", "full", 1),
    Case("pass_twice", "fssdp", "none", 4, ("parallel.max_sliced_experts=2", "parallel.rehome_interval=2")),
    Case("pass_twice", "fssdp", "none", 1, ("schedule=fixed", "schedule.chunks=2",
                                            "parallel.rematerialize=true")),
    Case("pass_twice", "fssdp", "full", 2, ("parallel.rematerialize=true", CALIBRATE)),
    Case("pass_twice", "fssdp", "selective", 1, ("train.count_pass=true",)),
    Case("one_bank", "fsdp", "full", 1),
    Case("one_bank", "fssdp", "none", 2, ("parallel.rematerialize=true",)),
    Case("surround", "ep", "full", 1),
    Case("surround", "fsdp", "selective", 1),
    Case("surround", "fssdp", "full", 4, ("train.count_pass=true", "parallel.rehome_interval=2")),
    Case("add_null_choices", "ep", "full", 1, ("schedule=fixed", "schedule.chunks=2")),
    Case("add_null_choices", "fsdp", "none", 1),
    Case("add_null_choices", "fssdp", "none", 2, ("train.count_pass=true",)),
    Case("route_attention", "fsdp", "full", 1),
    Case("route_attention", "fssdp", "full", 2, ("train.count_pass=true", "parallel.rematerialize=true")),
    Case("route_attention", "fssdp", "none", 1, ("parallel.rematerialize=true", "parallel.rehome_interval=2",
                                                 CALIBRATE)),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        everything = [Case(*factors) for factors in product(
            CONVERSIONS, MESHES, ("none", "selective", "full"), (1, 4))]
        cases = everything if metafunc.config.getoption("--all") else PAIRS
        metafunc.parametrize("case", cases, ids=lambda case: "-".join(map(str, case[:4])))


@cache
def truth(convert: str, steps: int = STEPS) -> Trained:
    return alone(["run.dtype=float64"], steps, None, getattr(sparse_layers, convert))


@pytest.mark.ranks
def test_a_mesh_trains_as_one_process(ranks, case: Case) -> None:
    assert_alike(on_mesh(ranks, case), truth(case.convert))


def on_mesh(ranks, case: Case, steps: int = STEPS) -> Trained:
    world, overrides = MESHES[case.mesh]
    overrides = [*overrides, *case.more, "run.dtype=float64", f"run.nproc={world}",
                 f"train.activation_checkpointing={case.checkpointing}",
                 f"train.micro_batch={16 // world // case.accumulation}"]
    convert = getattr(sparse_layers, case.convert)
    if world == 1:
        return alone(overrides, steps, None, convert)
    if case.mesh == "fssdp":
        return union(ranks(world).run(train_with_copies, overrides, steps, None, len(str(case)), convert))
    return union(ranks(world).run(train_steps, overrides, steps, None, convert))


def assert_alike(ours: Trained, expected: Trained) -> None:
    for what in ("gradients", "parameters"):
        error, name = difference(getattr(ours, what), getattr(expected, what))
        assert error <= 1e-10, f"{what}: {name} differs by {error:.3g} of its largest value"
    for mine, theirs in zip(ours.metrics, expected.metrics, strict=True):
        for key in ("loss/ce", "loss/total", "loss/balance", "grad_norm", "moe/max_violation/mean",
                    "moe/dead_experts", "moe/drop_fraction"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-10, abs=1e-12), key
    for mine, theirs in zip(ours.counts, expected.counts, strict=True):
        assert list(mine) == list(theirs) and all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_the_layers_of_a_conversion_have_moved_and_differ() -> None:
    """Else the cases above could compare what does nothing."""
    plain = alone(["run.dtype=float64"], STEPS)
    for convert in CONVERSIONS:
        trained = truth(convert)
        start = alone(["run.dtype=float64"], 0, None, getattr(sparse_layers, convert)).parameters
        assert all((trained.parameters[name] - start[name]).abs().max() > 0 for name in start), convert
        assert trained.metrics[0]["loss/ce"] != plain.metrics[0]["loss/ce"], convert


def test_records_tell_experts_from_other_choices(tmp_path, monkeypatch) -> None:
    """Loads are those of all choices; what says how experts are loaded is of experts alone."""
    monkeypatch.chdir(tmp_path)
    words = ["experiment=debug", "run.steps=2", "model.dim=16", "train.seq_len=8", "train.global_batch=4",
             "eval.windows=1", "eval.interval=1", "run.device=cpu", "run.name=null", "capacity=position",
             "capacity.factor=0.5", "capacity.min_capacity=0"]
    train(compose(words), convert_model=sparse_layers.add_null_choices)
    with np.load("runs/null/loads.npz") as found:
        assert found["experts"].tolist() == [8, 8] and found["choices"].tolist() == [11, 11]
        loads = found["loads"]
    assert (loads.sum(-1) == 4 * 8 * 2).all() and loads[..., 8:].sum() > 0
    experts = loads[..., :8]
    for step, line in enumerate(Path("runs/null/metrics.jsonl").read_text().splitlines()):
        metrics = json.loads(line)
        violation = experts[step].max(-1) / experts[step].mean(-1) - 1
        assert metrics["moe/max_violation/mean"] == pytest.approx(violation.mean())
        assert metrics["moe/dead_experts"] == (experts[step] == 0).sum()
        assert 0 < metrics["moe/drop_fraction"] < 1
    own = for_run(["run.name=null"])
    assert evaluate_run(own, convert_model=sparse_layers.add_null_choices).step == 2
    with np.load("runs/null/specialisation.npz") as found:
        assert found["experts"].tolist() == [8, 8] and found["choices"].shape[1:] == (2, 8)
    drawn = read_loads(Path("runs/null/loads.npz"))
    assert np.isnan(drawn.counts[..., 8:]).all() and not np.isnan(drawn.counts[..., :8]).any()
    assert Path("runs/null/report/expert_load.png").is_file() or draw(Path("runs/null"))


def forecast_and_counts(overrides: list[str], convert: str) -> tuple[dict, dict, dict]:
    """What is forecast for each bank after a step, the counts of the step, and the routers of each bank."""
    run = make_run(overrides, None, getattr(sparse_layers, convert))
    counts = train_step(run, 1).counts
    return run.state.planning.forecaster.loads(), counts, run.state.model.feeds


@pytest.mark.ranks
@pytest.mark.parametrize("convert", ["pass_twice", "one_bank", "add_null_choices"])
def test_a_bank_is_planned_by_the_choices_of_all_routers_that_feed_it(ranks, convert: str) -> None:
    overrides = ["parallel=fssdp", "run.nproc=2", "train.micro_batch=8"]
    for loads, counts, feeds in ranks(2).run(forecast_and_counts, overrides, convert):
        assert loads.keys() == feeds.keys() and sum(map(len, feeds.values())) == len(counts)
        for bank, routers in feeds.items():
            assert loads[bank].tolist() == sum(counts[router][:8] for router in routers).tolist()


@pytest.mark.ranks
@pytest.mark.parametrize("counts", ["global", "micro"])
def test_a_router_that_decides_twice_is_updated_once_by_both_passes(ranks, counts: str) -> None:
    words = ["router=sigmoid", "router.update_rate=0.01", "router.center=false", f"router.counts={counts}",
             "run.dtype=float64"]
    expected, biases = train_and_biases(words, 2)
    on_two = [*words, "parallel=fsdp", "run.nproc=2", "train.micro_batch=8"]
    for _, theirs in ranks(2).run(train_and_biases, on_two, 2) if counts == "global" else ():
        assert [mine.tolist() for mine in theirs] == [bias.tolist() for bias in biases]
    first = [expected.counts[0][f"layers.0.moe.{number}"] for number in (0, 1)]
    assert not torch.equal(*first)
    _, biases = train_and_biases(words, 1)
    signs = [(count.sum() - 8 * count).sign() for count in ([sum(first)] if counts == "global" else first)]
    assert biases[0].tolist() == pytest.approx((0.01 * torch.stack(signs).double().mean(0)).tolist())


def train_and_biases(overrides: list[str], steps: int) -> tuple[Trained, list[torch.Tensor]]:
    run = make_run(overrides, None, sparse_layers.share_router)
    trained = train_run(run, steps)
    return trained, [block.moe.router[0].bias.clone() for block in run.state.model.layers]


@pytest.mark.parametrize("convert", ["pass_twice", "surround"])
def test_a_run_resumes_with_the_parameters_of_its_layers(tmp_path, monkeypatch, convert: str) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["experiment=debug", "run.steps=2", "model.dim=16", "train.seq_len=8", "train.global_batch=4",
             "eval.windows=1", "run.device=cpu"]
    change = getattr(sparse_layers, convert)
    train(compose([*words, "run.name=whole"]), convert_model=change)
    for stop in (1, 2):
        train(compose([*words, "run.name=resumed", f"run.stop_at={stop}"]), convert_model=change)
    whole, resumed = (json.loads(Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()[-1])
                      for name in ("whole", "resumed"))
    for key in ("loss/total", "grad_norm", "moe/max_violation/mean"):
        assert whole[key] == resumed[key], key
