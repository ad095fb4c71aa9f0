"""Recorded timelines: what ran when.

Counts are on their way while the head runs, and nobody waits for them before the loss.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from moetrain.errors import DiskError
from moetrain.train.count_pool import CountAllReduce
from moetrain.train.loggers.timeline import Timeline
from moetrain.train.step import train_step
from tests.support.training import make_run
from tools.study.balance_trace import pooled, spans  # noqa: E402

# Four micro-batches a step
ACCUMULATED = ["parallel=ep", "run.nproc=2", "train.micro_batch=2"]
MODES = {"exact": [], "counted first": ["train.count_pass=true"], "sync": ["balance.mode=sync"],
         "buffer": ["balance.mode=buffer"],
         "warm": ["balance.mode=warm"]}


def recorded(overrides: list[str], directory: Path, steps: int, at_once: bool = False) -> None:
    """at_once: the defect, counts are awaited where they are posted."""
    run, original = make_run([*ACCUMULATED, *overrides]), CountAllReduce._add
    timeline = Timeline(directory, run.mesh, replace(run.config.log, timeline=1))

    def add(self, counts_L) -> None:
        original(self, counts_L)
        if self.parts == 0:
            counts_L = self.wait()
            self.wait = lambda: counts_L

    CountAllReduce._add = add if at_once else original
    try:
        for step in range(1, steps + 1):
            with timeline.step(step, run.state.model):
                train_step(run, step)
    finally:
        CountAllReduce._add = original


def hidden(directory: Path) -> list[list[bool]]:
    """Whether nobody waited for an all-reduce of counts before a loss.

    Of every rank, one entry for every such all-reduce in the recorded step.
    """
    found = []
    for path in sorted((directory / "log/timeline/step-00000002").iterdir()):
        found.append([one.next.name == "loss" and any(span.name == "head" for span in one.covered)
                      for one in pooled(spans(path))])
    return found


@pytest.mark.ranks
@pytest.mark.parametrize("mode", MODES)
def test_nobody_waits_for_counts_before_the_loss(ranks, tmp_path, mode):
    ranks(2).run(recorded, MODES[mode], tmp_path, 2)
    assert hidden(tmp_path) == [[True] * (1 if mode in ("exact", "counted first") else 4)] * 2


@pytest.mark.ranks
@pytest.mark.parametrize("mode", ["exact", "buffer"])
def test_counts_leave_before_the_tokens_of_the_last_layer(ranks, tmp_path, mode):
    """So that a rank whose tokens come late holds nobody up at the loss."""
    ranks(2).run(recorded, MODES[mode], tmp_path, 2)
    for path in (tmp_path / "log/timeline/step-00000002").iterdir():
        found = spans(path)
        for one in pooled(found):
            head = next(span for span in found if span.name == "head" and span.begin > one.post.begin)
            # There and back
            assert [span.name for span in found
                    if one.post.begin < span.begin < head.begin].count("gloo:all_to_all") >= 2


@pytest.mark.ranks
@pytest.mark.parametrize("mode", ["exact", "buffer"])
def test_where_gradients_are_attached_nobody_waits_before_the_head_has_run_backward(ranks, tmp_path, mode):
    ranks(2).run(recorded, [*MODES[mode], "train.aux_loss=injected"], tmp_path, 2)
    for path in (tmp_path / "log/timeline/step-00000002").iterdir():
        found = pooled(spans(path))
        softmax = [event["ts"] for event in json.loads(path.read_text())["traceEvents"]
                   if event.get("name") == "LogSoftmaxBackward0"]
        assert len(found) == (1 if mode == "exact" else 4) and len(softmax) == 4
        for one in found:
            assert (one.next.name == "backward"
                    and any(one.next.begin <= at <= one.wait.begin for at in softmax))
            assert any(span.name == "head" for span in one.covered)


@pytest.mark.ranks
def test_a_wait_before_the_head_is_seen(ranks, tmp_path):
    ranks(2).run(recorded, MODES["buffer"], tmp_path, 2, True)
    assert hidden(tmp_path) == [[False] * 4] * 2


@pytest.mark.ranks
def test_the_all_reduce_of_counts_is_on_the_thread_that_carries_it(ranks, tmp_path):
    ranks(2).run(recorded, MODES["warm"], tmp_path, 2)
    for path in (tmp_path / "log/timeline/step-00000002").iterdir():
        for one in pooled(spans(path)):
            assert (one.post.begin <= one.transfer.begin < one.transfer.end
                    and one.transfer.begin < one.wait.end)


@pytest.mark.ranks
def test_only_the_steps_that_were_asked_for_are_recorded_and_parts_of_the_model_are_named(ranks, tmp_path):
    ranks(2).run(recorded, [], tmp_path, 4)
    ranks(2).run(recorded, ["log.timeline=1", "log.timeline_start=3"], tmp_path / "later", 4)
    assert [path.name for path in (tmp_path / "later/log/timeline").iterdir()] == ["step-00000003"]
    assert [path.name for path in (tmp_path / "log/timeline").iterdir()] == ["step-00000002"]
    names = [span.name for span in spans(tmp_path / "log/timeline/step-00000002/rank-0001.json")]
    for name, times in {"forward": 4, "head": 4, "loss": 4, "backward": 4, "reduce": 1, "optimizer": 1,
                        "layers.0": 4,
                        "layers.1.attention": 4, "layers.1.moe": 4}.items():
        assert names.count(name) == times, name


def test_a_place_that_is_taken_is_said(tmp_path):
    (tmp_path / "log").mkdir()
    (tmp_path / "log/timeline").write_text("in the way")
    with pytest.raises(DiskError, match="log.timeline=0"):
        recorded(["parallel=single", "run.nproc=1"], tmp_path, 2)


@pytest.mark.parametrize("left", ["", '{"traceEvents": [{"ph": "X", "na'])
def test_a_record_that_was_written_in_part_is_not_left_behind(tmp_path, monkeypatch, left):
    """What torch does on a full disk: nothing, or a beginning, and no error."""
    monkeypatch.setattr("torch.profiler.profile.export_chrome_trace",
                        lambda self, path: [Path(f"{path}{end}").write_text(left) for end in ("", ".tmp")])
    with pytest.raises(DiskError, match="as a whole"):
        recorded(["parallel=single", "run.nproc=1"], tmp_path, 2)
    assert not list((tmp_path / "log/timeline/step-00000002").iterdir())
