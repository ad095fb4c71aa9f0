"""A run of two steps and its checkpoint, made once; every test gets a copy of the directory."""

import shutil
from pathlib import Path

import pytest

from moetrain.train.setup import Run
from tests.train.checkpoint.saved import saved, trained


@pytest.fixture(scope="session")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    run = trained(2)
    return run, saved(run, tmp_path_factory.mktemp("two-steps"))


@pytest.fixture
def checkpoint(two_steps: tuple[Run, Path], tmp_path: Path) -> Path:
    """tmp_path is the run's directory."""
    return Path(shutil.copytree(two_steps[1], tmp_path / "checkpoints" / two_steps[1].name))
