"""The command line with run.device=cuda, in processes of its own that have simulated CUDA devices.

Two of them train; one evaluates, generates and draws what they trained.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import simulated_device, small_text
from tests.support.device_process import environment

UNAVAILABLE = simulated_device.unavailable()
pytestmark = [pytest.mark.slow, pytest.mark.ranks,
              pytest.mark.skipif(bool(UNAVAILABLE), reason=UNAVAILABLE or "there is one")]

SMALL = ["experiment=debug", "data=text", "data.path=text", "run.device=cuda", "run.steps=2",
         "optim.warmup=1", "model.dim=32", "train.seq_len=24", "eval.windows=1", "generate.tokens=4",
         "generate.prompt=ab"]
ALONE = ["run.nproc=1", "parallel=single"]
TWO = ["run.nproc=2", "parallel=fssdp"]


def moetrain(*words: str, cwd: Path) -> str:
    """What the command printed, both streams; no warning of torch among it."""
    done = subprocess.run([sys.executable, "-m", "moetrain", *words], cwd=cwd, text=True, timeout=240,
                          env=environment(devices=2), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, f"{words} ended with {done.returncode}:\n{done.stdout}"
    assert "Warning" not in done.stdout, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory of a run on two devices."""
    cwd = tmp_path_factory.mktemp("trained")
    small_text.write(cwd / "text")
    moetrain("train", *SMALL, *TWO, "run.name=small", cwd=cwd)
    return cwd


def test_two_devices_train_and_record_what_they_are(trained: Path) -> None:
    directory = trained / "runs/small"
    record = json.loads((directory / "env.json").read_text())
    assert record["device"] == "cuda:0" and record["mesh"]["ep"] == 2 and record["kernels"] != "in use"
    assert json.loads((directory / "status.json").read_text())["code"] == 0
    assert (directory / "loads.npz").exists() and (directory / "report/expert_load.png").exists()


def test_verbs_read_the_run_on_a_device(trained: Path) -> None:
    (record,) = (json.loads(line) for line in (trained / "runs/small/eval.jsonl").read_text().splitlines())
    table = moetrain("eval", "small", *ALONE, cwd=trained)
    assert f"{record['loss/letters']:.3f}"[:-1] in table
    assert len(moetrain("generate", "small", *ALONE, cwd=trained).splitlines()) >= 1
    assert "expert_load.png" in moetrain("report", "small", cwd=trained)
