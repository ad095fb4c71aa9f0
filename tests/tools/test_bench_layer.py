"""The bench of a layer: its emulated link keeps time, its cells are resumed, its layer is a layer."""

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moetrain.comm.exchange.base import Splits
from tests.support.runs import ROOT, children, ended
from tools.bench import layer as bench_layer
from tools.bench.layer import Clock, EmulatedLink, Layer, Shape, predicted, summary, table
from tools.netlab import lab as netlab

CPU = torch.device("cpu")


class Still(Clock):
    """Time passes by waiting alone."""

    def now(self) -> float:
        return self.waited


def options(out: Path, *, only: str = "") -> argparse.Namespace:
    return argparse.Namespace(
        out=str(out), shapes=["mixtral", "olmoe"], only=only, ratios=[1.0], chunks=[1, 2], tokens=16, ep=4,
        divide=256, rate=None, latency=0.0, repeats=1, device="cpu", dtype="float32", threads=1,
        between=None, clock="cpu", worker=False)


def test_messages_occupy_the_link_one_after_the_other():
    clock = Still()
    link = EmulatedLink(2, 100.0, 0.5, CPU, clock)
    # Two rows of 100 bytes leave: 0.5 + 2 s.
    message, splits = torch.zeros(3, 25), Splits((1, 2), (1, 2))
    first, second = (link.start(message, splits, returning=False, read=True) for _ in range(2))
    link.finish(first)
    assert clock.now() == pytest.approx(2.5)
    clock.waited += 1.0                                  # a second of work under the second message
    link.finish(second)
    assert clock.now() == pytest.approx(5.0)
    assert (link.bytes, link.messages) == (400, 2)


def test_chunks_do_not_change_what_a_layer_sends():
    bytes_of = {}
    for chunks in (1, 3):
        link = EmulatedLink(4, float("inf"), 0.0, CPU, Clock())
        Layer(Shape(8, 8, 8, 2), 24, link, CPU, torch.float32, Clock()).step(chunks, exact=False)
        bytes_of[chunks] = link.bytes
        assert link.messages == 4 * chunks               # there and back, forward and backward
    assert bytes_of[1] == bytes_of[3] > 0


def test_cells_are_measured_once(tmp_path, monkeypatch):
    out = tmp_path / "layer.json"
    bench_layer.work(options(out, only="mixtral"))
    assert list(json.loads(out.read_text())["cells"]) == ["mixtral/1.0"]
    measured = []
    whole = bench_layer.emulated

    def noted(given: argparse.Namespace, shape: Shape, ratio: float) -> dict:
        measured.append(shape)
        return whole(given, shape, ratio)

    monkeypatch.setattr(bench_layer, "emulated", noted)
    bench_layer.work(options(out))
    assert list(json.loads(out.read_text())["cells"]) == ["mixtral/1.0", "olmoe/1.0"] and len(measured) == 1
    assert table(json.loads(out.read_text())).count("\n") == 1 + 2 * 4


def test_hidden_is_what_a_step_lacks_of_both():
    arm = summary(2, False, step_s=5.0, compute_s=4.0, cut_s=4.5, comm_s=3.0, comm_cut_s=3.2)
    assert arm["hidden"] == pytest.approx(2 / 3) and arm["predicted_s"] == pytest.approx(4.5 + 3 * 0.4)
    assert predicted(1, 4.5, 3.2) == pytest.approx(7.7)
    assert predicted(4, 3.0, 16.0) == pytest.approx(1 + 6 + 1 + 1 + 6 + 1)


@pytest.fixture
def between(tmp_path):
    """between(*words): the tool with two ranks, on a tiny layer."""
    try:
        with netlab.Lab(nodes=1, per_node=1, inside="1gbit"):
            pass
    except netlab.LabError as error:
        pytest.skip(str(error))
    started = []

    def between(*words: str) -> subprocess.Popen:
        started.append(subprocess.Popen(
            [sys.executable, "-m", "tools.bench.layer", "--out", str(tmp_path / "layer.json"),
             "--between", "400mbit", "--shapes", "mixtral", "--divide", "64", "--tokens", "64",
             "--ratios", "1", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, text=True))
        return started[0]

    yield between
    started[0].kill()


@pytest.mark.slow
@pytest.mark.ranks
def test_two_ranks_measure_a_cell(between, tmp_path):
    code, output = ended(between("--repeats", "1", "--chunks", "1", "2"))
    assert code == 0, output
    cell = json.loads((tmp_path / "layer.json").read_text())["cells"]["mixtral/1.0"]
    assert output.count("| mixtral, 1.0 |") == len(cell["arms"]) == 4


@pytest.mark.slow
@pytest.mark.ranks
def test_a_rank_that_stands_still_ends_the_run_and_is_named(between):
    process = between("--repeats", "100000", "--wait", "3")
    while "mixtral/1.0" not in (line := process.stdout.readline()):
        assert line, "it ended before it measured"
    rank = next(child for child in children(process.pid)
                if b"RANK=1" in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"))
    os.kill(rank, signal.SIGSTOP)
    code, output = ended(process, 90)
    assert code == 1 and "netlab: rank 1 (stopped) still ran 10 s after rank 0 failed" in output, output
    assert not Path(f"/proc/{rank}").exists()
