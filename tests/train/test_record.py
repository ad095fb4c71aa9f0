"""What a run writes down beside the numbers of its steps."""

import json
import time
from pathlib import Path

from moetrain.config.compose import compose
from moetrain.train.loop import train


def test_records_say_when_they_were_written_and_what_training_waited_for(tmp_path: Path) -> None:
    began = time.time()
    train(compose(["experiment=debug", "run.steps=3", f"run.dir={tmp_path}", "eval.interval=1", "checkpoint.interval=2", "checkpoint.async_save=false",
                   "run.device=cpu", "log.progress=false"]))
    first, second, third = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first["time/eval"] == 0 < second["time/eval"] and second["time/save"] < third["time/save"]
    assert began < first["timestamp"] < second["timestamp"] < third["timestamp"] < time.time()
    evaluations = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    assert [record["step"] for record in evaluations] == [1, 2, 3]
    assert second["time/eval"] <= evaluations[0]["time/eval"] < second["timestamp"] - first["timestamp"]
    between = third["timestamp"] - second["timestamp"] - third["time/step"]
    assert third["time/save"] + third["time/eval"] < between + 0.001
