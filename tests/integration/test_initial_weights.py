"""init.from on every mesh from every mesh: the same bits, and a training that begins anew.

A run is trained on one mesh and saved; on another a run begins from its weights. Its weights are the source's
to the bit, its optimizer is that of a new run, and it trains as one process does that begins from them.
"""

from functools import cache
from pathlib import Path

import pytest
import torch

from moetrain.checkpoint.digest import weights_digest
from moetrain.checkpoint.manifest import read_manifest
from moetrain.checkpoint.tensor_names import NAMING
from moetrain.parallel.state_shards import weights
from moetrain.train.checkpoint.save import save
from moetrain.train.initial_weights import load_initial_weights, with_initial_weights
from moetrain.train.state import Run
from tests.support.random_copies import run_with_copies
from tests.support.training import Held, Trained, difference, make_run, train_run, union, whole

STEPS = 3
MODEL = ["run.dtype=float64", "router=sigmoid", "router.update_rate=0.01", "model.num_layers=3",
         "model.moe_layers=[0,2]", "model.vocab_size=60"]
MESHES = {"single": (1, []), "ddp": (2, ["parallel=ddp"]), "ep": (2, ["parallel=ep"]),
          "fsdp": (2, ["parallel=fsdp"]), "ep_fsdp": (2, ["parallel=ep_fsdp"]),
          "fssdp": (2, ["parallel=fssdp", "parallel.rehome_interval=2"])}
# Sources and destinations of every kind: whole, over ep, sharded, with homes.
PAIRS = [("single", "fssdp"), ("fsdp", "ep"), ("ep_fsdp", "single"), ("fssdp", "fsdp")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "pair" in metafunc.fixturenames:
        every = [(first, second) for first in MESHES for second in MESHES]
        metafunc.parametrize("pair", every if metafunc.config.getoption("--all") else PAIRS,
                             ids=lambda pair: "-to-".join(pair))


def built(mesh: str, extra: tuple[str, ...] = ()) -> Run:
    world, parallel = MESHES[mesh]
    words = [*MODEL, *parallel, f"run.nproc={world}", f"train.micro_batch={16 // world}", *extra]
    return run_with_copies(words) if mesh == "fssdp" else make_run(words)


def held(run: Run) -> Held:
    return {shard.name: (shard.shape, shard.begin, shard.rows.detach().clone())
            for shard in weights(run.state.model)}


def saved(run: Run, directory: Path) -> Path:
    return save(run.state, directory, run.mesh, {"names": NAMING})


def source_of(mesh: str, directory: Path) -> tuple[Path, Held]:
    """Train two steps and save; on every rank."""
    run = built(mesh)
    train_run(run, 2)
    return saved(run, directory), held(run)


def begun(mesh: str, source: Path, directory: Path) -> tuple[Held, str, Trained, float]:
    """Begin from weights, save at once, and train; on every rank."""
    run = built(mesh, (f"init.from={source}", "run.seed=5", "data.seed=0"))
    run.directory = directory
    run.config = with_initial_weights(run.config, directory)
    load_initial_weights(run)
    first, moment = held(run), max(float(shard.rows.abs().max()) for shard in run.state.state_shards()
                                   if shard.name.startswith("optim.") and shard.rows.numel())
    digest = weights_digest(read_manifest(saved(run, directory)))
    assert digest == run.config.init.digest and run.state.step == 0
    return first, digest, train_run(run, STEPS), moment


def on_ranks(ranks, mesh: str, function, *arguments) -> list:
    world = MESHES[mesh][0]
    return [function(mesh, *arguments)] if world == 1 else ranks(world).run(function, mesh, *arguments)


@cache
def alone_from(source: Path, directory: Path) -> Trained:
    return union([begun("single", source, directory)[2]])


@pytest.mark.parametrize("there, here, said", [
    (0, 2, "mtp.0, mtp.1 are not in the weights: they start anew"),
    (2, 1, "mtp.1 of the weights are left out")])
def test_modules_of_multi_token_prediction_are_added_or_left_out(there, here, said, tmp_path, caplog) -> None:
    small = [*MODEL, "run.nproc=1"]
    source = make_run([*small, f"model.mtp_layers={there}"])
    checkpoint = saved(source, tmp_path / "source")
    run = make_run([*small, f"model.mtp_layers={here}", f"init.from={checkpoint}", "run.seed=5",
                    "data.seed=0"])
    run.directory, fresh = tmp_path / "begun", held(run)
    run.config = with_initial_weights(run.config, run.directory)
    load_initial_weights(run)
    weights_there, weights_here = held(source), held(run)
    assert said in caplog.text and len(weights_here) != len(weights_there)
    for name, (_, _, rows) in weights_here.items():
        expected = weights_there if name in weights_there else fresh
        assert torch.equal(rows, expected[name][2]), name


@pytest.mark.ranks
def test_a_run_begins_from_weights_on_every_mesh(ranks, pair, tmp_path) -> None:
    first, second = pair
    results = on_ranks(ranks, first, source_of, tmp_path / "source")
    source, weights_there = results[0][0], whole([result[1] for result in results])
    found = on_ranks(ranks, second, begun, source, tmp_path / "begun")
    weights_here = whole([result[0] for result in found])
    assert weights_here.keys() == weights_there.keys()
    assert all(torch.equal(weights_here[name], weights_there[name]) for name in weights_there)
    assert {result[1] for result in found} == {weights_digest(read_manifest(source))}
    assert all(result[3] == 0 for result in found), "the optimizer begins anew"
    ours, truth = union([result[2] for result in found]), alone_from(source, tmp_path / "alone")
    for what in ("gradients", "parameters"):
        error, name = difference(getattr(ours, what), getattr(truth, what))
        assert error <= 1e-10, f"{what}: {name} differs by {error:.3g} of its largest value"
    for mine, theirs in zip(ours.metrics, truth.metrics, strict=True):
        for key in ("loss/ce", "loss/total", "loss/balance", "grad_norm"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-10), key
