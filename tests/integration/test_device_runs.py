"""Whole runs on a simulated device give the CPU's numbers: saves, evaluation, generation, records, memory."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from moetrain.config.compose import compose, for_run
from moetrain.errors import ConfigError
from moetrain.generate.sample import continue_text
from moetrain.train.evaluation.evaluate import evaluate
from moetrain.train.evaluation.trained import load_trained, trained_dataset, trained_tokenizer
from moetrain.train.loop import train
from moetrain.train.memory import device_memory
from moetrain.train.memory.fit import refuse_what_cannot_fit
from moetrain.train.memory.graph_memory import choose_graphs
from moetrain.train.session import join
from moetrain.train.setup import set_up
from moetrain.train.step import train_step
from tests.support import simulated_device, small_text
from tests.support.device_process import DeviceProcess
from tests.support.simulated_device.memory import allocated

UNAVAILABLE = simulated_device.unavailable()
pytestmark = pytest.mark.skipif(bool(UNAVAILABLE), reason=UNAVAILABLE or "there is one")

STEPS = 3
SMALL = ["model.dim=16", "model.num_layers=2", "model.expert_dim=16", "model.num_experts=8",
         "train.global_batch=8", "train.seq_len=24", "optim=adamw", "optim.warmup=1", "optim.lr=1e-2",
         f"run.steps={STEPS}", "log.wandb=off", "log.progress=false"]
RECORDED = ["data=text", "eval.windows=2", "run.dtype=float32", "router=sigmoid", "log.sources=true",
            "log.router_dump=true", "log.timeline=1", "checkpoint.interval=1"]


@pytest.fixture(scope="module")
def device() -> Iterator[DeviceProcess]:
    with DeviceProcess() as process:
        yield process


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_text.write(tmp_path_factory.mktemp("text"))


# --- saves, resume, evaluation, generation


def attempt(directory: Path, text: Path, device: str, *overrides: str) -> None:
    words = [f"data.path={text}", f"run.dir={directory}", f"run.device={device}", *overrides]
    train(compose([*SMALL, *RECORDED, *words]))


def broken(directory: Path, text: Path, first: str, second: str, asynchronous: bool) -> None:
    """A run that stops after its second step, loses that save, and goes on from the one of its first step."""
    attempt(directory, text, first, "run.stop_at=2", f"checkpoint.async_save={asynchronous}")
    shutil.rmtree(directory / "checkpoints" / "step-00000002")
    attempt(directory, text, second)


class Looked(NamedTuple):
    losses: dict[str, float]
    texts: set[str]                          # with the cache and without


def looked_at(directory: Path, device: str) -> Looked:
    """Held-out losses and two continuations by the newest checkpoint."""
    config = for_run([f"run.dir={directory}", f"run.device={device}"])
    run = load_trained(config)
    assert run.step == STEPS and run.model.embed.device.type == device
    options = {"tokens": 12, "temperature": 0.8, "top_p": 0.95, "seed": 1, "run_seed": 0, "step": STEPS,
               "context": 12, "mask_documents": False}
    texts = {"".join(continue_text(run.model, trained_tokenizer(run), "ab", end_id=256, cache=cache,
                                   group=run.mesh["batch"], **options))
             for cache in (True, False)}
    return Looked(evaluate(run.model, trained_dataset(run), run.mesh, config, step=STEPS).losses, texts)


def lines(path: Path) -> list[dict[str, float]]:
    """Records, without what a clock or a machine says."""
    records = (json.loads(line) for line in path.read_text().splitlines())
    measured = ("time", "throughput/", "memory/")
    return [{name: value for name, value in record.items() if not name.startswith(measured)}
            for record in records]


@pytest.fixture(scope="module")
def unbroken(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("unbroken")
    attempt(directory, text, "cpu")
    return directory


@pytest.mark.parametrize("first, second, asynchronous",
                         [("cuda", "cpu", True), ("cpu", "cuda", True), ("cuda", "cuda", False)])
def test_a_run_goes_on_on_another_device(first: str, second: str, asynchronous: bool, device: DeviceProcess,
                                         text: Path, unbroken: Path, tmp_path: Path) -> None:
    device.run(broken, tmp_path, text, first, second, asynchronous)
    for name in ("metrics.jsonl", "eval.jsonl"):
        ours, theirs = lines(tmp_path / name), lines(unbroken / name)
        assert [record["step"] for record in ours] == [record["step"] for record in theirs]
        for mine, other in zip(ours, theirs):
            assert mine == pytest.approx(other, rel=2e-5, abs=1e-6)
    ours, theirs = (np.load(directory / "loads.npz") for directory in (tmp_path, unbroken))
    assert all(np.array_equal(ours[name], theirs[name]) for name in ("loads", "sources", "steps"))
    assert ours["sources"].sum() > 0
    for dump in (unbroken / "log" / "router").rglob("*.safetensors"):
        mine, other = load_file(tmp_path / dump.relative_to(unbroken)), load_file(dump)
        assert mine.keys() == other.keys()
        assert all(np.allclose(mine[name], other[name], atol=1e-5) for name in mine)
    assert list((tmp_path / "log" / "timeline").rglob("*rank-0000*"))
    assert {json.loads((tmp_path / "env.json").read_text())["device"]} == {second.replace("cuda", "cuda:0")}


def test_a_device_evaluates_and_writes_as_the_cpu_does(device: DeviceProcess, unbroken: Path) -> None:
    there, here = (device.run(looked_at, unbroken, name) for name in ("cuda", "cpu"))
    assert there.losses == pytest.approx(here.losses, rel=1e-5)
    assert there.texts == here.texts and len(here.texts) == 1


# --- memory

SYNTHETIC = ["data=synthetic", "data.vocab_size=48", "run.device=cuda", "run.dtype=bfloat16",
             "train.micro_batch=2"]


class Measured(NamedTuple):
    kept: bool                               # the graphs of all micro-batches
    free: int
    loss: float


def measured(taken: int) -> Measured:
    """A step after the choice between kept graphs and a count pass. taken: bytes that others have."""
    config = compose([*SMALL, *SYNTHETIC])
    run = set_up(config, Path("unused"), join(config))
    allocated[0] += taken
    try:
        run.graphs = choose_graphs(run)
    finally:
        allocated[0] -= taken
    return Measured(run.graphs.kept, run.graphs.free, train_step(run, 1).metrics["loss/total"])


def sizes() -> tuple[int, int, int]:
    """Bytes of the device: all, free, and free beside another tensor with what that takes."""
    mesh = join(compose([*SMALL, *SYNTHETIC]))
    before = device_memory.free_memory(mesh, share_gpu=False)
    held = torch.empty(1 << 20, dtype=torch.uint8, device=mesh.device)
    after = device_memory.free_memory(mesh, share_gpu=False)
    return device_memory.available_memory(mesh, share_gpu=True).gpu, before, after + held.nbytes


def refused() -> str:
    config = compose([*SMALL, *SYNTHETIC, "model.dim=8192", "model.expert_dim=8192"])
    with pytest.raises(ConfigError) as error:
        refuse_what_cannot_fit(config, join(config))
    return str(error.value)


def test_the_memory_of_the_device_decides_on_the_count_pass(device: DeviceProcess) -> None:
    whole, before, after = device.run(sizes)
    assert whole == 8 << 30 and before == after <= whole
    much, little = device.run(measured, 0), device.run(measured, whole - (1 << 18))
    assert much.kept and not little.kept and much.loss == little.loss
    assert (1 << 18) >= little.free and whole >= much.free > 0.9 * whole


def test_a_model_that_the_device_cannot_hold_is_refused(device: DeviceProcess) -> None:
    refusal = device.run(refused)
    assert "E-CONFIG-181" in refusal and "a GPU of 8" in refusal
