"""Whole runs through the command line: real processes, real files."""

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.support import warm_start
from tests.support.command_line import (
    DEBUG,
    EP2,
    ROOT,
    environment,
    files,
    metrics,
    moetrain,
    numbers,
    weights,
)


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("mesh", [["train.micro_batch=2"],
                                  pytest.param([*EP2, "train.micro_batch=2"], marks=pytest.mark.full)],
                         ids=["single", "ep2"])
def test_a_resumed_run_has_the_bits_of_an_unbroken_one(tmp_path, mesh):
    moetrain("train", *DEBUG, *mesh, "run.name=whole", cwd=tmp_path)
    moetrain("train", *DEBUG, *mesh, "run.name=broken", "run.stop_at=5", cwd=tmp_path)
    moetrain("train", *DEBUG, *mesh, "run.name=broken", cwd=tmp_path)
    whole, broken = tmp_path / "runs/whole", tmp_path / "runs/broken"
    assert numbers(broken) == numbers(whole) and len(numbers(whole)) == 8
    assert weights(broken) == weights(whole)
    loads = [np.load(directory / "loads.npz") for directory in (whole, broken)]
    assert (loads[0]["loads"] == loads[1]["loads"]).all() and loads[1]["steps"].tolist() == list(range(1, 9))


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_save_and_keeps_the_cut_tail(tmp_path):
    command = [*DEBUG, "run.steps=60", "checkpoint.interval=7", "run.name=killed"]
    process = warm_start.Popen([sys.executable, "-m", "moetrain", "train", *command], cwd=tmp_path,
                               env=environment(),
                               stdout=subprocess.DEVNULL)
    lines = tmp_path / "runs/killed/metrics.jsonl"
    while not (lines.exists() and len(lines.read_text().splitlines()) >= 17):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert "resumed from step" in moetrain("train", *command, cwd=tmp_path)
    moetrain("train", *command, "run.name=whole", cwd=tmp_path)
    assert numbers(tmp_path / "runs/killed") == numbers(tmp_path / "runs/whole")
    assert weights(tmp_path / "runs/killed") == weights(tmp_path / "runs/whole")
    assert (tmp_path / "runs/killed/metrics.jsonl.lost").exists()


@pytest.mark.slow
@pytest.mark.ranks
def test_the_command_of_a_finished_run_says_so_and_changes_nothing(tmp_path):
    moetrain("train", *DEBUG, *EP2, cwd=tmp_path, PICTURES="1")
    before = files(tmp_path / "runs/debug")
    assert "finished" in moetrain("train", *DEBUG, *EP2, cwd=tmp_path)
    assert files(tmp_path / "runs/debug") == before
    assert {"metrics.jsonl", "eval.jsonl", "loads.npz", "config.yaml", "env.json", "status.json",
            "report/expert_load.png"} <= before.keys()
    refused = moetrain("train", *DEBUG, *EP2, "run.seed=1", "model.dim=64", cwd=tmp_path, code=2)
    assert "run.seed" in refused and "model.dim" in refused
    assert files(tmp_path / "runs/debug") == before
    # One process reads what two wrote
    assert "mean" in moetrain("eval", "run.name=debug", cwd=tmp_path)


@pytest.mark.ranks
@pytest.mark.full                        # without the command line: test_parity.py
def test_meshes_agree_through_the_command_line(tmp_path):
    common = [*DEBUG, "run.dtype=float64", "data.min_length=0.4", "balance.weight=0.1"]
    moetrain("train", *common, "run.name=one", cwd=tmp_path)
    moetrain("train", *common, *EP2, "run.name=two", "log.sources=true", cwd=tmp_path)
    moetrain("-m", "moetrain", "train", *common, "parallel=ddp", "train.micro_batch=4", "run.name=torchrun",
             cwd=tmp_path,
             launcher=("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"))
    one = metrics(tmp_path / "runs/one")
    for other in ("two", "torchrun"):
        for mine, theirs in zip(one, metrics(tmp_path / "runs" / other), strict=True):
            for key in ("loss/ce", "loss/total", "loss/balance", "grad_norm", "tokens",
                        "moe/max_violation/mean"):
                assert abs(mine[key] - theirs[key]) <= 1e-9 * max(1.0, abs(mine[key])), (other, key)
    loads = np.load(tmp_path / "runs/two/loads.npz")
    assert loads["sources"].shape[2] == 2 and (loads["sources"].sum(2) == loads["loads"]).all()
    assert (loads["loads"] == np.load(tmp_path / "runs/one/loads.npz")["loads"]).all()


ROUTER = '''
import torch
from moetrain.routers.base import LinearRouter, Scores


class RoundRobinRouter(LinearRouter):
    depends_on = frozenset({"positions_T"})

    def scores(self, x_TD, context):
        logits_TE = self.logits(x_TD)
        return Scores(None, logits_TE.softmax(-1), logits_TE)

    def choose(self, order_TC, context):
        return (context.positions_T[:, None] + torch.arange(self.top_k)) % self.num_experts
'''


@pytest.mark.slow
def test_a_new_router_is_one_file_and_one_yaml(tmp_path):
    for name in ("moetrain", "conf"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "moetrain/routers/round_robin.py").write_text(ROUTER)
    (tmp_path / "conf/router/round_robin.yaml").write_text(
        "_target_: moetrain.routers.round_robin.RoundRobinRouter\n")
    subprocess.run([sys.executable, "-m", "moetrain", "train", *DEBUG, "router=round_robin", "run.steps=2"],
                   cwd=tmp_path,
                   env=environment(tmp_path), check=True, stdout=subprocess.DEVNULL)
    loads = np.load(tmp_path / "runs/debug/loads.npz")["loads"]
    assert (loads == loads[0, 0, 0]).all()                       # 16 positions, 8 experts: perfectly even


@pytest.mark.slow
def test_text_of_strangers_trains_evaluates_and_continues(tmp_path):
    for domain, word in (("prose", "the quick brown fox. "), ("code", "def f(x):\n    return x\n")):
        for number in range(30):
            path = tmp_path / "corpus" / domain / f"{number}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{number} " + word * (40 + number))
    text = ["data=text", "data.path=corpus", "data.mask_documents=true", "run.dtype=bfloat16", "loss=[z]",
            "run.name=mine"]
    command = [*DEBUG, *text, "eval.interval=4"]
    out = moetrain("train", *command, "run.stop_at=4", cwd=tmp_path)
    assert "prose" in out and "code" in out
    changed = tmp_path / "corpus/prose/0.txt"
    original = changed.read_text()
    changed.write_text("something else " * 50)
    assert "E-DATA-062" in moetrain("train", *command, cwd=tmp_path, code=12)
    changed.write_text(original)
    moetrain("train", *command, cwd=tmp_path)
    records = [json.loads(line) for line in (tmp_path / "runs/mine/eval.jsonl").read_text().splitlines()]
    assert ([record["step"] for record in records] == [4, 8]
            and {"loss/prose", "loss/code"} <= records[0].keys())
    assert "order 2" in moetrain("eval", "run.name=mine", "eval.ngram=2", cwd=tmp_path)
    words = ["generate", "run.name=mine", "generate.tokens=12", "generate.prompt=the "]
    assert moetrain(*words, cwd=tmp_path) == moetrain(*words, cwd=tmp_path)


@pytest.mark.slow
def test_bad_input_gets_its_exit_code_and_nothing_is_written_over(tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert "E-DISK" in moetrain("train", *DEBUG, "run.dir=file/run", cwd=tmp_path, code=14)
    assert (tmp_path / "file").read_text() == "in the way"
    assert "E-DATA" in moetrain("train", *DEBUG, "data=text", "data.path=nowhere", cwd=tmp_path, code=12)
    moetrain("train", *DEBUG, "run.name=hurt", "run.stop_at=2", cwd=tmp_path)
    payload = next((tmp_path / "runs/hurt/checkpoints").rglob("*.safetensors"))
    content = bytearray(payload.read_bytes())
    content[-5] ^= 1
    payload.write_bytes(content)
    refused = moetrain("train", *DEBUG, "run.name=hurt", cwd=tmp_path, code=13)
    assert payload.name in refused and "Traceback" not in refused
    assert payload.read_bytes() == bytes(content)


@pytest.mark.slow
@pytest.mark.ranks
def test_an_error_of_rank_zero_is_said_once_and_ends_all_ranks(tmp_path):
    out = moetrain("train", *DEBUG, *EP2, "data=text", "data.path=nowhere", cwd=tmp_path, code=12)
    assert out.count("E-DATA") == 1 and "Traceback" not in out
    assert json.loads((tmp_path / "runs/debug/status.json").read_text())["code"] == 12


@pytest.mark.slow
@pytest.mark.ranks
def test_a_checkpoint_damaged_on_one_rank_ends_all_ranks(tmp_path):
    moetrain("train", *DEBUG, *EP2, "run.stop_at=2", cwd=tmp_path)
    payload = next((tmp_path / "runs/debug/checkpoints").rglob("rank-0001.safetensors"))
    content = bytearray(payload.read_bytes())
    content[-5] ^= 1
    payload.write_bytes(content)
    out = moetrain("train", *DEBUG, *EP2, cwd=tmp_path, code=13)
    assert "rank" in out and "Traceback" not in out
    assert payload.name in (tmp_path / "runs/debug/log/rank-1.log").read_text()
    assert json.loads((tmp_path / "runs/debug/status.json").read_text())["code"] == 13


@pytest.mark.slow
def test_a_rank_that_finds_nobody_says_where_it_looked(tmp_path):
    alone = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": "9"}
    done = warm_start.run([sys.executable, "-m", "moetrain", "train", *DEBUG, "parallel=ep",
                           "run.timeout_s=3"], cwd=tmp_path,
                          env={**environment(), **alone}, text=True, stderr=subprocess.STDOUT,
                          stdout=subprocess.PIPE, timeout=60)
    assert done.returncode == 15, done.stdout


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path):
    out = moetrain("train", *DEBUG, "model.init_std=1e25", cwd=tmp_path, code=11)
    assert "E-NONFINITE" in out and not list((tmp_path / "runs/debug/checkpoints").iterdir())


@pytest.mark.slow
def test_a_lost_config_is_read_from_the_checkpoint_and_a_strangers_checkpoint_is_refused(tmp_path):
    words = [*DEBUG, "eval.windows=1", "run.name=mine"]
    moetrain("train", *words, "run.stop_at=2", cwd=tmp_path)
    config = tmp_path / "runs" / "mine" / "config.yaml"
    before = config.read_text()
    for harm in (lambda: config.write_bytes(b""), config.unlink):
        harm()
        assert "E-CONFIG-065" in moetrain("eval", "run.name=mine", cwd=tmp_path, code=2)
        refused = moetrain("train", *words, "run.seed=5", cwd=tmp_path, code=2)
        assert refused.count("E-CONFIG-016") == 1 and "run.seed" in refused
    moetrain("train", *DEBUG, "eval.windows=1", "run.name=other", "run.seed=5", "run.steps=4", cwd=tmp_path)
    foreign = tmp_path / "runs" / "mine" / "checkpoints" / "step-00000004"
    shutil.copytree(tmp_path / "runs" / "other" / "checkpoints" / foreign.name, foreign)
    config.write_text(before)
    state = files(foreign.parent)
    refused = moetrain("train", *words, cwd=tmp_path, code=13)
    assert refused.count("E-CHECKPOINT-007") == 1 and "run.seed was 5" in refused and foreign.name in refused
    assert files(foreign.parent) == state
    shutil.rmtree(foreign)                               # as the message says
    config.unlink()
    assert "resumed from step 2" in moetrain("train", *words, "run.stop_at=3", cwd=tmp_path)
    assert config.read_text() == before.replace("stop_at: 2", "stop_at: 3")
