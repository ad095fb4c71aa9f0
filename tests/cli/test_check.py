"""moetrain check: the parts alone, in this process, and with trainings behind --all."""

import json
from pathlib import Path

import pytest

from moetrain import packages
from moetrain.__main__ import main

NOISY = '''"""A router with noise that every rank draws for itself."""

import torch
from torch import Tensor

from moetrain.routers.topk import TopKRouter


class NoisyRouter(TopKRouter):
    def logits(self, x_TD: Tensor) -> Tensor:
        logits_TE = super().logits(x_TD)
        return logits_TE + torch.randn_like(logits_TE)
'''


@pytest.fixture
def noisy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Class of a package that is allowed."""
    (tmp_path / "noisy_moe").mkdir()
    (tmp_path / "noisy_moe/__init__.py").write_text("")
    (tmp_path / "noisy_moe/router.py").write_text(NOISY)
    monkeypatch.syspath_prepend(tmp_path)
    packages.allow("noisy_moe")
    return "router._target_=noisy_moe.router.NoisyRouter"


def test_parts_are_checked_in_seconds(noisy: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["check", "--parts", "router=sigmoid", "loss=[z]"]) == 0
    said = capsys.readouterr().out
    assert said.endswith("no promise is broken\n") and "BROKEN" not in said and "training" not in said
    assert main(["check", "--parts", noisy]) == 1
    assert "BROKEN  the same tokens decide the same again" in capsys.readouterr().out
    assert main(["check", "--parts", "--json", noisy]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert not answer["holds"] and {"part", "promise", "seen", "try"} == set(answer["broken"][0])
    assert main(["check", "--parts", "router.no_such_key=1"]) == 2
    assert main(["check", "--parts", "loss=[micro_balance]"]) == 0       # without the keys of another loss


@pytest.mark.full
def test_trainings_find_what_differs_between_ranks(noisy: str, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch,
                                                   capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert main(["check", "--json", "router=sigmoid"]) == 0
    assert main(["check", "--json", noisy]) == 1
    broken = json.loads(capsys.readouterr().out.splitlines()[-1])["broken"]
    assert {"again, in one process", "2 ranks, expert parallel"} <= {entry["promise"] for entry in broken}
