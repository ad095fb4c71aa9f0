"""The run that the tests transform, and its folder as the current one."""

from pathlib import Path

import pytest

from moetrain.__main__ import main
from tests.support.trained_run import corpus, train


@pytest.fixture(scope="package")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/mine, which has selection biases and a dense layer, evaluated."""
    folder = tmp_path_factory.mktemp("transform")
    corpus(folder / "corpus")
    train(folder, "router=sigmoid", "model.num_layers=3", "model.moe_layers=[0,2]")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["eval", "mine"]) == 0
    return folder


@pytest.fixture(autouse=True)
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
