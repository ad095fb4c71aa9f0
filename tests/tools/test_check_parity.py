"""The parity script: what runs alike is found equal, what differs in one number or one count is not."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moetrain.check import training
from moetrain.config.compose import from_yaml

ROOT = Path(__file__).resolve().parents[2]
GIVEN = ["router=sigmoid", "router.update_rate=0.05", "train.micro_batch=8", "run.steps=8"]


def check(out: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.check.parity", "--out", str(out), *overrides]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def checked(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("parity")
    done = check(out, *GIVEN)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_micro_batches_are_the_whole_batch(checked):
    ((name, result),) = json.loads((checked / "parity.json").read_text()).items()
    assert name == "given" and result["equal"] and result["counts"] == "the same"
    assert 0 <= result["first"] < 1e-12


def test_the_reference_is_what_the_overrides_describe_and_not_how(checked):
    trained = {name: from_yaml(checked / name / "config.yaml") for name in ("given", "reference")}
    assert all(config.router["update_rate"] == 0.05 and config.run.dtype == "float64"
               for config in trained.values())
    micro_batches = {name: config.train.micro_batch for name, config in trained.items()}
    assert micro_batches == {"given": 8, "reference": 16}
    overrides = ["experiment=quickstart", "parallel=fssdp", "parallel.max_copies=1", "+planner=laer",
                 "run.dtype=bfloat16", "run.steps=3", "train.global_batch=6"]
    kept = training.reference(overrides).overrides
    assert {"experiment=quickstart", "run.steps=3", "parallel=single", "train.micro_batch=6"} < set(kept)
    assert not {*training.COMMON, *overrides[1:5]} & set(kept)
    assert training.given_arm(["run.dtype=bfloat16"], "cpu").dtype == "bfloat16"


def test_overrides_that_are_wrong_are_answered_before_anything_starts(tmp_path):
    done = check(tmp_path / "out", "optim.lrr=1")
    assert done.returncode == 2 and "E-CONFIG-003" in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype, step, name, factor, equal", [
    ("float64", -1, "grad_norm", 1 + 1e-8, False), ("float64", -1, "grad_norm", 1 + 1e-10, True),
    ("float64", 5, "loss/ce", float("nan"), False), ("float32", 1, "grad_norm", 1 + 2e-4, False),
    ("float32", -1, "grad_norm", 1.1, True), ("float32", -1, "loss/ce", 1.01, False),
])
def test_numbers_are_compared_as_closely_as_their_dtype_allows(
        checked, dtype, step, name, factor, equal, monkeypatch):
    arm, numbers = training.Arm("given", dtype, []), training.numbers

    def changed(directory: Path) -> np.ndarray:
        found = numbers(directory)
        if "given" in directory.name:
            found[step, training.NUMBERS.index(name)] *= factor
        return found

    monkeypatch.setattr(training, "numbers", changed)
    assert training.compare(checked, arm)["equal"] == equal


def test_one_count_is_seen(checked, tmp_path):
    shutil.copytree(checked, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "given" / "loads.npz"
    loads = dict(np.load(path))
    loads["loads"][3, 0, :2] += [1, -1]
    np.savez(path, **loads)
    assert not training.compare(tmp_path, training.Arm("given", "float64", []))["equal"]


def test_an_arm_that_ran_otherwise_has_failed(checked):
    environment = json.loads((checked / "given" / "env.json").read_text())
    arm = training.Arm("given", "float64", ["run.device=cpu"])
    assert training.astray(arm, environment) is None
    assert "not cuda" in training.astray(arm._replace(overrides=["run.device=cuda"]), environment)
    assert "MOETRAIN_KERNELS is not set" in training.astray(arm._replace(kernels=True), environment)
