"""What a run writes down beside the numbers of its steps."""

import json
import time
from itertools import pairwise
from pathlib import Path

from moetrain.config.compose import compose
from moetrain.data.batches.batch import Batch
from moetrain.data.loader import Loader
from moetrain.train.loop import train
from moetrain.train.state import Run


def test_records_say_when_they_were_written_and_what_training_waited_for(tmp_path: Path) -> None:
    began = time.time()
    train(compose(["experiment=debug", "run.steps=3", f"run.dir={tmp_path}", "eval.interval=1",
                   "checkpoint.interval=2", "checkpoint.async_save=false",
                   "run.device=cpu", "log.progress=false"]))
    first, second, third = (json.loads(line)
                            for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first["time/eval"] == 0 < second["time/eval"] and second["time/save"] < third["time/save"]
    assert began < first["timestamp"] < second["timestamp"] < third["timestamp"] < time.time()
    evaluations = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    assert [record["step"] for record in evaluations] == [1, 2, 3]
    assert second["time/eval"] <= evaluations[0]["time/eval"] < second["timestamp"] - first["timestamp"]
    between = third["timestamp"] - second["timestamp"] - third["time/step"]
    assert third["time/save"] + third["time/eval"] < between + 0.001


class Watched:
    """A loader that notes, before every step reads, which files of the run there are: inode and size."""

    def __init__(self, loader: Loader, directory: Path) -> None:
        self.loader, self.directory, self.seen = loader, directory, []
        self.micro_batches = loader.micro_batches

    def step(self, step: int) -> list[Batch]:
        found = {path: path.stat() for path in self.directory.rglob("*")
                 if path.is_file() and "checkpoints" not in path.parts}
        self.seen.append({path.name: (stat.st_ino, stat.st_size) for path, stat in found.items()})
        return self.loader.step(step)


def test_a_step_and_a_save_add_to_the_records_and_rewrite_none(tmp_path: Path) -> None:
    """But for specialisation.npz, which is of the last evaluation alone."""
    watched = []

    def watch(run: Run) -> Run:
        run.loader = Watched(run.loader, tmp_path)
        watched.append(run.loader)
        return run

    train(compose(["experiment=debug", "run.steps=9", f"run.dir={tmp_path}", "eval.interval=2",
                   "eval.windows=1", "checkpoint.interval=2", "checkpoint.async_save=false",
                   "run.device=cpu", "log.progress=false", "log.sources=true"]),
          wrap_engine=watch)
    seen = watched[0].seen
    grown = {name for name in seen[-1] if name in seen[3] and seen[-1][name][1] > seen[3][name][1]}
    assert ({"metrics.jsonl", "eval.jsonl", "saves.jsonl"} < grown
            and any(name.endswith(".i32") for name in grown))
    for before, after in pairwise(seen[1:]):
        for name in before.keys() - {"specialisation.npz"}:
            assert after[name][0] == before[name][0], name
            assert before[name][1] <= after[name][1] <= before[name][1] + 4096, name
