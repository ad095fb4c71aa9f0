"""The parity script: what runs alike is found equal, what differs in one number or one count is not."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tools import check_parity

ROOT = Path(__file__).resolve().parents[2]


def check(out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/check_parity.py", "--out", str(out), "--only", "alone, float64"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def checked(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("parity")
    done = check(out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_micro_batches_are_the_whole_batch(checked):
    (result,) = json.loads((checked / "parity.json").read_text()).values()
    assert result["equal"] and result["counts"] == "the same" and 0 <= result["first"] < 1e-12


@pytest.mark.parametrize("dtype, step, name, factor, equal", [
    ("float64", -1, "grad_norm", 1 + 1e-8, False), ("float64", -1, "grad_norm", 1 + 1e-10, True), ("float64", 5, "loss/ce", float("nan"), False),
    ("float32", 1, "grad_norm", 1 + 2e-4, False), ("float32", -1, "grad_norm", 1.1, True), ("float32", -1, "loss/ce", 1.01, False),
])
def test_numbers_are_compared_as_closely_as_their_dtype_allows(checked, dtype, step, name, factor, equal, monkeypatch):
    arm, numbers = check_parity.Arm("alone, float64", dtype, []), check_parity.numbers

    def changed(directory: Path) -> np.ndarray:
        found = numbers(directory)
        if "alone" in directory.name:
            found[step, check_parity.NUMBERS.index(name)] *= factor
        return found

    monkeypatch.setattr(check_parity, "numbers", changed)
    assert check_parity.compare(checked, arm)["equal"] == equal


def test_one_count_is_seen(checked, tmp_path):
    shutil.copytree(checked, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "alone-float64" / "loads.npz"
    loads = dict(np.load(path))
    loads["loads"][3, 0, :2] += [1, -1]
    np.savez(path, **loads)
    assert not check_parity.compare(tmp_path, check_parity.Arm("alone, float64", "float64", []))["equal"]


def test_an_arm_that_ran_otherwise_has_failed(checked):
    environment = json.loads((checked / "alone-float64" / "env.json").read_text())
    arm = check_parity.Arm("alone, float64", "float64", ["run.device=cpu"])
    assert check_parity.astray(arm, environment) is None
    assert "not cuda" in check_parity.astray(arm._replace(overrides=["run.device=cuda"]), environment)
    assert "MOETRAIN_KERNELS is not set" in check_parity.astray(arm._replace(kernels=True), environment)
