"""A small run with a checkpoint, and ways to harm one."""

import shutil
from pathlib import Path

import pytest
from torch import Tensor

from moetrain.train.checkpoint.save import save
from moetrain.train.state import Run, TrainState
from moetrain.train.step import train_step
from tests.support.training import make_run

SIZES = ["model.num_shared_experts=1"]
SMALL = ["model.num_layers=1", "model.num_experts=2", "model.dim=8", "model.num_heads=2",
         "model.num_kv_heads=1", "model.expert_dim=8", "data.vocab_size=16"]


def trained(steps: int, overrides: list[str] = SIZES) -> Run:
    run = make_run(overrides)
    for step in range(1, steps + 1):
        train_step(run, step)
    return run


def saved(run: Run, run_dir: Path, step: int | None = None) -> Path:
    """A checkpoint of the run; step: call it another one."""
    run.state.step = run.state.step if step is None else step
    return save(run.state, run_dir, run.mesh, {"data": "none"})


def tensors(state: TrainState) -> dict[str, Tensor]:
    """Copies of all the state that this one process holds."""
    return {shard.name: shard.rows.clone() for shard in state.state_shards()}


def flip(path: Path, position: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0] ^ (1 << bit)
        file.seek(position)
        file.write(bytes([byte]))


def payload(directory: Path) -> Path:
    return directory / "rank-0000.safetensors"


@pytest.fixture(scope="session")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """A run of two steps and its checkpoint, made once; a test that changes it takes `checkpoint`."""
    run = trained(2)
    return run, saved(run, tmp_path_factory.mktemp("two-steps"))


@pytest.fixture
def checkpoint(two_steps: tuple[Run, Path], tmp_path: Path) -> Path:
    """A copy of the checkpoint; tmp_path is the run's directory."""
    return Path(shutil.copytree(two_steps[1], tmp_path / "checkpoints" / two_steps[1].name))
