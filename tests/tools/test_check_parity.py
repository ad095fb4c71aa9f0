"""The parity script: what runs alike is found equal, what differs in one number or one count is not."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

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
    assert result["equal"] and result["counts"] == "the same" and 0 <= result["difference"] < 1e-12


def test_one_number_and_one_count_are_seen(checked):
    run = checked / "alone-float64"
    metrics, loads = (run / "metrics.jsonl").read_text(), dict(np.load(run / "loads.npz"))
    lines = [json.loads(line) for line in metrics.splitlines()]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, [*lines[:-1], lines[-1] | {"grad_norm": lines[-1]["grad_norm"] * (1 + 1e-8)}])))
    done = check(checked)
    assert done.returncode == 1 and "not alone, float64" in done.stdout
    (run / "metrics.jsonl").write_text(metrics)
    loads["loads"][3, 0, :2] += [1, -1]
    np.savez(run / "loads.npz", **loads)
    done = check(checked)
    assert done.returncode == 1 and "counts others" in done.stdout
