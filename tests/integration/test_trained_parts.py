"""The parts of a checkpoint are the checkpoint's: a command that changes one says so, or is refused."""

import json
from pathlib import Path
from unittest.mock import ANY

import pytest
import yaml

from moetrain.__main__ import main
from moetrain.config.compose import compose, for_run
from moetrain.train.evaluation.trained import load_trained
from moetrain.train.loop import train
from tests.support.trained_run import corpus

SMALL = ["experiment=debug", "data=text", "data.path=corpus", "model.dim=16", "model.num_layers=2",
         "model.expert_dim=8", "model.first_dense_layers=1", "train.seq_len=12", "train.global_batch=4",
         "eval.windows=2", "run.device=cpu", "run.dtype=float64", "run.steps=2", "run.name=mine",
         "log.progress=false"]
PART = '''
from torch import Tensor
from moetrain.routers.topk import TopKRouter

class WarmRouter(TopKRouter):
    START_ARGUMENTS = ("first_temperature",)

    def __init__(self, *, dim: int, num_experts: int, top_k: int, first_temperature: float = 1.0,
                 gain: float = 1.0) -> None:
        super().__init__(dim=dim, num_experts=num_experts, top_k=top_k)
        self.first_temperature, self.gain = first_temperature, gain

    def logits(self, x_TD: Tensor) -> Tensor:
        return super().logits(x_TD) * self.gain
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose router is of a package of one's own. Its first layer is dense, as wide as two experts."""
    folder = tmp_path_factory.mktemp("parts")
    corpus(folder / "corpus")
    (folder / "warm_parts").mkdir()
    (folder / "warm_parts/__init__.py").write_text("")
    (folder / "warm_parts/router.py").write_text(PART)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        patch.setenv("MOETRAIN_PACKAGES", "warm_parts")
        train(compose([*SMALL, "router._target_=warm_parts.router.WarmRouter"]))
    return folder


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("MOETRAIN_PACKAGES", "warm_parts")


def evaluated(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[dict, str]:
    """The record that `moetrain eval` prints, and its warnings."""
    assert main(["eval", "mine", "run.device=cpu", "--json", *words]) == 0
    out, err = capsys.readouterr()
    assert (Path("runs/mine/eval.jsonl").read_text().splitlines()[-1]) == out.strip()
    return json.loads(out), err


def test_another_number_of_experts_is_evaluated_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    """Renormalized weights of one expert have no gradient, which an evaluation does not need."""
    plain, nothing = evaluated(capsys)
    assert "[warn]" not in nothing and "changed" not in plain
    found, said = evaluated(capsys, "model.top_k=1")
    assert found["loss/mean"] != plain["loss/mean"]
    assert found["changed"] == {"model.top_k": [2, [2, 1]]}
    assert "[warn] model.top_k was 2 in training and is [2,1] now: this is not the model" in said
    assert main(["generate", "mine", "run.device=cpu", "model.top_k=1", "generate.tokens=2",
                 "generate.prompt=ab"]) == 0
    assert "[warn] model.top_k was 2 in training" in capsys.readouterr().err


def test_an_argument_that_changes_the_router_is_said_and_one_that_starts_it_refused(
        capsys: pytest.CaptureFixture[str]) -> None:
    plain, _ = evaluated(capsys)
    found, said = evaluated(capsys, "router.gain=3.0")
    assert found["loss/mean"] != plain["loss/mean"] and found["changed"] == {"router.gain": [1.0, 3.0]}
    assert "[warn] router.gain was 1 in training and is 3 now" in said
    for verb in ("eval", "generate"):
        assert main([verb, "mine", "run.device=cpu", "router.first_temperature=0.5"]) == 2
        said = capsys.readouterr().err
        assert "E-CONFIG-212  router.first_temperature=0.5 has no effect" in said
        assert "trained with 1" in said and "leave router.first_temperature out" in said
    same = {"time/eval": ANY, "timestamp": ANY}
    assert evaluated(capsys, "router.first_temperature=1.0")[0] == plain | same


def test_a_record_that_was_changed_by_hand_is_found_out(capsys: pytest.CaptureFixture[str]) -> None:
    """What was trained stands in the checkpoint, too."""
    path = Path("runs/mine/config.yaml")
    text = path.read_text()
    recorded = yaml.safe_load(text)
    try:
        path.write_text(yaml.safe_dump(recorded | {"router": recorded["router"] | {"gain": 2.0},
                                                   "run": recorded["run"] | {"steps": 9, "seed": 4}}))
        found, said = evaluated(capsys)
        assert found["changed"] == {"router.gain": [1.0, 2.0]} and "[warn] router.gain was 1 " in said
        run = load_trained(for_run(["mine", "run.device=cpu"]))
        assert (run.config.run.steps, run.config.run.seed, run.step) == (2, 0, 2)
    finally:
        path.write_text(text)
