"""The command line with run.device=cuda, in processes of its own that have simulated CUDA devices.

What a user sees: exit codes, the banner, env.json, and nothing on the terminal that moetrain did not write.
"""

import json
import re
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
         "optim.warmup=1", "model.dim=32", "train.seq_len=24", "eval.windows=1", "generate.tokens=4", "generate.prompt=ab"]
ALONE = ["run.nproc=1", "parallel=single"]
TWO = ["run.nproc=2", "parallel=fssdp"]
# The lines of a run: the banner's labels, steps, what is marked, the tokens per expert, the closing table.
LINES = re.compile(
    r"moetrain [\d.]+ \| run |(model|parallel|batch|balance|losses|copies|schedule|data|saves|memory) +\S|"
    r"step +\d+/\d+ |\[(save|eval|warn|data)\]|tokens per expert:|layers\.\d+\.moe |"
    r"finished at step|(run|next|report|resume)? {2,}\S|$")


def moetrain(*words: str, cwd: Path, code: int = 0) -> str:
    """What the command printed, both streams."""
    done = subprocess.run([sys.executable, "-m", "moetrain", *words], cwd=cwd, text=True, timeout=240,
                          env=environment(devices=2), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == code, f"{words} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The working directory of a run on two devices, and what it printed."""
    cwd = tmp_path_factory.mktemp("trained")
    small_text.write(cwd / "text")
    return cwd, moetrain("train", *SMALL, *TWO, "run.name=small", cwd=cwd)


def test_two_devices_train_and_say_what_they_are(trained: tuple[Path, str]) -> None:
    cwd, said = trained
    assert "2 ranks = EP 2 x DP 1   fssdp on cuda, bfloat16" in said and "step     2/2" in said
    assert [line for line in said.splitlines() if not LINES.match(line)] == [], said
    record = json.loads((cwd / "runs/small/env.json").read_text())
    assert record["device"] == "cuda:0" and record["mesh"]["ep"] == 2 and record["kernels"] != "in use"
    assert json.loads((cwd / "runs/small/status.json").read_text())["code"] == 0
    assert (cwd / "runs/small/loads.npz").exists() and (cwd / "runs/small/report/expert_load.png").exists()


def test_verbs_read_the_run_on_a_device(trained: tuple[Path, str]) -> None:
    cwd, _ = trained
    (record,) = (json.loads(line) for line in (cwd / "runs/small/eval.jsonl").read_text().splitlines())
    table = moetrain("eval", "small", *ALONE, cwd=cwd)
    assert f"{record['loss/letters']:.3f}"[:-1] in table and "Warning" not in table
    assert len(moetrain("generate", "small", *ALONE, cwd=cwd).splitlines()) >= 1
    assert "expert_load.png" in moetrain("report", "small", cwd=cwd)


@pytest.mark.full
def test_one_device_trains_and_more_ranks_than_devices_are_refused(trained: tuple[Path, str]) -> None:
    cwd, _ = trained
    said = moetrain("train", *SMALL, "run.name=one", cwd=cwd)
    assert "single on cuda, bfloat16" in said
    assert [line for line in said.splitlines() if not LINES.match(line)] == [], said
    assert "is finished: step 2" in moetrain("train", *SMALL, "run.name=one", cwd=cwd)
    three = ["run.name=three", "run.nproc=3", "parallel=ddp", "train.global_batch=6"]
    refused = moetrain("train", *SMALL, *three, cwd=cwd, code=2)
    assert refused.count("E-CONFIG-092") == 1 and "Traceback" not in refused


@pytest.mark.full
def test_verbs_run_on_two_devices(trained: tuple[Path, str]) -> None:
    cwd, _ = trained
    table = moetrain("eval", "small", cwd=cwd)
    assert table.count("letters") == 1 and "Warning" not in table
    assert moetrain("generate", "small", cwd=cwd) == moetrain("generate", "small", *ALONE, cwd=cwd)
