"""The training benchmark: it runs as its page says, both sides agree, and what it reports adds up."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
ONCE = ["--rounds", "1", "--steps", "1", "--threads", "1"]


@pytest.fixture
def bench(tmp_path):
    def run(*arguments: str) -> dict:
        command = [sys.executable, "-m", "tools.bench.train", *arguments, *ONCE,
                   "--out", str(tmp_path / "train.json")]
        subprocess.run(command, cwd=ROOT, check=True, timeout=240, capture_output=True)
        return json.loads((tmp_path / "train.json").read_text())

    return run


def test_beside_transformers(bench):
    report = bench("--experts=8", "--top-k=2", "--dim=64", "--layers=2", "--heads=4", "--kv-heads=2",
                   "--expert-dim=32", "--batch=2", "--seq=32", "--peers", "eager", "grouped_mm")
    assert {"moetrain", "transformers grouped_mm"} <= report["sides"].keys() | report["left_out"].keys()
    assert report["ratios"]["best_peer"] in report["sides"] and report["ratios"]["peak"] > 0
    assert report["sides"]["moetrain"]["mfu"] is None        # a CPU has no data sheet


def test_a_model_of_the_configuration_cut_in_depth_ours_alone(bench):
    report = bench("--model=qwen3_30b_a3b", "--layers=1", "--dim=64", "--head-dim=16", "--expert-dim=32",
                   "--vocab=300", "--batch=2", "--seq=32", "--head-chunk=16", "--zipf=1", "--peers")
    assert list(report["sides"]) == ["moetrain"] and "best_peer" not in report["ratios"]
    width, heads, kv, h, experts, slots = 64, 32, 4, 16, 128, 8
    attention = 2 * width * h * (2 * heads + 2 * kv) + 2 * heads * h * 33
    forward = attention + 2 * width * experts + 6 * width * 32 * slots + 2 * width * 300
    assert report["flops_per_token"] == 3 * forward
    ours = report["sides"]["moetrain"]
    reached = ours["tokens_per_s"] * report["flops_per_token"]
    assert ours["of_r"] == pytest.approx(reached / report["rates"]["of_r"])


def test_tokens_follow_the_law_that_is_asked_for():
    from tools.bench.train_baselines import random_batch

    share = {}
    for zipf in (0.0, 1.0):
        batch = random_batch(Namespace(vocab=1000, batch=8, seq=1000, zipf=zipf), 0, torch.device("cpu"))
        share[zipf] = (batch.tokens_BS == 0).double().mean()
    harmonic = sum(1 / rank for rank in range(1, 1001))
    assert share[0.0] < 0.003 and share[1.0] == pytest.approx(1 / harmonic, rel=0.1)


def test_what_has_no_counterpart_is_refused_beside_transformers():
    command = [sys.executable, "-m", "tools.bench.train", "--model=qwen1_5_moe_a2_7b", "--layers=2",
               "--peers", "eager"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "no shared experts" in done.stderr and "Traceback" not in done.stderr
