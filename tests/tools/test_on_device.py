"""Tools with --device cuda on a simulated device, at tiny sizes, from their first line to their last."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support import simulated_device, small_text
from tests.support.device_process import environment

UNAVAILABLE = simulated_device.unavailable()
pytestmark = pytest.mark.skipif(bool(UNAVAILABLE), reason=UNAVAILABLE or "there is one")

ROOT = Path(__file__).parents[2]
TINY = ["model.dim=32", "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=1", 
        "model.head_dim=16", "model.num_experts=8", "model.top_k=2", "model.expert_dim=16",
        "train.seq_len=32"]

SMALL_OPS = ["--small", "--repeats=1"]


def tool(name: str, *words: str, devices: int = 1, code: int = 0) -> str:
    """What it printed, both streams."""
    done = subprocess.run([sys.executable, f"tools/{name}.py", *words], cwd=ROOT, text=True, timeout=500,
                          env=environment(devices), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == code, f"{name} ended with {done.returncode}:\n{done.stdout[-4000:]}"
    return done.stdout


def kept_pages() -> dict[Path, str]:
    """What lies in docs/results: no tool writes there when it is told where else."""
    return {path: path.read_text() for path in (ROOT / "docs/results").glob("*.md")}


def test_times_of_ops_are_written_with_the_name_of_the_device(tmp_path: Path) -> None:
    """Also where nvidia-smi is not installed, as in most containers."""
    out = tmp_path / "ops.json"
    said = tool("bench_ops", "--out", str(out), *SMALL_OPS, "--only=permute,swiglu", "--shapes=mixtral")
    record = json.loads(out.read_text())
    (process,) = record["processes"]
    assert process["chip"] == "Simulated CUDA device" and "meaningless" not in process
    assert {key.split()[0] for key in record["cells"]} == {"permute", "swiglu"} and "WRONG" not in said
    assert all("seconds" in cell or "absent" in cell for cell in record["cells"].values())


@pytest.mark.full
def test_every_op_is_right(tmp_path: Path) -> None:
    said = tool("bench_ops", "--out", str(tmp_path / "ops.json"), *SMALL_OPS, "--shapes=mixtral,olmoe")
    assert "WRONG" not in said


@pytest.mark.full
def test_a_training_step_is_compared_with_transformers(tmp_path: Path) -> None:
    out = tmp_path / "train.json"
    sizes = ["--experts=8", "--top-k=2", "--dim=64", "--layers=2", "--heads=4", "--kv-heads=2",
             "--expert-dim=32", "--batch=2", "--seq=32", "--head-chunk=16", "--product=64"]
    tool("bench_train", "--device=cuda", "--dtype=bfloat16", *sizes, "--rounds=1", "--steps=1", "--profile",
         "--peers", "eager", "grouped_mm", "--out", str(out))
    report = json.loads(out.read_text())
    assert "moetrain" in report["sides"] and report["machine"]["device"] == "Simulated CUDA device"


@pytest.mark.full
def test_the_cost_of_statistics_has_a_page_for_each_device(tmp_path: Path) -> None:
    before = kept_pages()
    case = ["--device", "cuda", "--pairs", "2", "--cases", "qwen3 30b a3b, 4 layers, 2 micro-batches"]
    out = tmp_path / "page.md"
    tool("bench_balance", *TINY, "data.vocab_size=64", "train.head_chunk=16", *case, "--out", str(out))
    assert "on Simulated CUDA device" in out.read_text() and "model.dim=32" in out.read_text()
    assert "--out names another" in tool("bench_balance", *TINY, *case, code=2)
    assert kept_pages() == before


@pytest.mark.full
def test_chunks_hide_an_emulated_link(tmp_path: Path) -> None:
    out = tmp_path / "layer.json"
    sizes = ["--shapes", "mixtral", "--ratios", "1", "--chunks", "1", "2", "--tokens=32", "--divide=128"]
    tool("bench_layer", "--out", str(out), "--device=cuda", "--dtype=bfloat16", *sizes, "--repeats=1",
         "--rate=1e9", "--latency=1e-5")
    ((name, cell),) = json.loads(out.read_text())["cells"].items()
    assert name == "mixtral/1.0" and {arm["chunks"] for arm in cell["arms"]} == {1, 2}


@pytest.mark.full
def test_training_is_the_reference(tmp_path: Path) -> None:
    said = tool("check_parity", "--out", str(tmp_path), "--device=cuda", "--only=float32", "--no-kernels")
    assert "1 of 1 arms are the reference" in said


@pytest.mark.full
def test_a_timeline_of_ranks_that_share_a_device_shows_the_counts(tmp_path: Path) -> None:
    before = kept_pages()
    out = tmp_path / "trace.md"
    small = ["train.global_batch=8", "data.vocab_size=64"]
    tool("trace_balance", *TINY, *small, "--device=cuda", "--steps=1", "--out", str(out))
    assert "| buffer |" in out.read_text() and out.with_suffix(".png").exists() and kept_pages() == before


@pytest.mark.full
def test_the_study_of_balance_trains_on_a_device_and_writes_where_it_is_told(tmp_path: Path) -> None:
    before = kept_pages()
    small_text.write(tmp_path / "text")
    small = ["run.steps=2", "train.global_batch=4", "eval.windows=1", "optim.warmup=1"]
    said = tool("study_balance", *TINY, *small, f"data.path={tmp_path / 'text'}", "--size=gpu",
                "--minutes=0.02", "--out", str(tmp_path / "runs"), "--results", str(tmp_path / "found"))
    assert "1 runs have finished" in said and "One GPU, bfloat16" in (tmp_path / "found.md").read_text()
    assert kept_pages() == before
