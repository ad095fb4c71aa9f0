"""A model without experts, and so without routers: every mesh trains it, reports and evaluations are made."""

import json
from pathlib import Path

import pytest

from moetrain.config.compose import compose, for_run
from moetrain.report.run import draw
from moetrain.train.evaluation.evaluate_run import evaluate_run
from moetrain.train.loop import train
from tests.support.training import alone, difference, train_steps, union

DENSE = ["model.first_dense_layers=2", "run.dtype=float64"]
STEPS = 3
FSSDP = ["parallel=fssdp", "parallel.rehome_interval=2"]


@pytest.mark.ranks
@pytest.mark.parametrize("overrides", [
    ["parallel=ddp", "balance.mode=warm"], ["parallel=ep", "schedule=fixed", "schedule.chunks=2"],
    ["parallel=fsdp", "train.count_pass=true"], ["parallel=ep_fsdp", "train.aux_loss=injected"],
    [*FSSDP, "planner=hecate", "parallel.max_sliced_experts=1"],
    [*FSSDP, "parallel.calibrate=true", "train.activation_checkpointing=full"],
], ids=lambda overrides: overrides[0])
def test_every_mesh_trains_a_model_without_experts(ranks, overrides: list[str]) -> None:
    expected = alone(DENSE, STEPS)
    ours = union(ranks(2).run(train_steps, [*DENSE, *overrides, "run.nproc=2", "train.micro_batch=4"], STEPS))
    for what in ("gradients", "parameters"):
        error, name = difference(getattr(ours, what), getattr(expected, what))
        assert error <= 1e-10, (what, name, error)
    assert ours.counts == [{}] * STEPS and ours.metrics[-1]["loss/ce"] != ours.metrics[0]["loss/ce"]


def test_records_evaluation_report_and_resuming_do_without_experts(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["experiment=debug", "parallel=fssdp", "model.first_dense_layers=2", "run.steps=2",
             "model.dim=16", "train.seq_len=8", "train.global_batch=2", "eval.windows=1", "eval.interval=1",
             "run.device=cpu", "run.name=dense"]
    train(compose([*words, "run.stop_at=1"]))
    train(compose(words))
    records = [json.loads(line) for line in Path("runs/dense/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2]
    assert not any(name.startswith("moe/max_violation") for name in records[-1])
    assert evaluate_run(for_run(["run.name=dense"])).step == 2
    assert [path.name for path in draw(Path("runs/dense"))] == ["loss.png"]
