"""Table of recorded timelines."""

import csv
import json
import logging
from pathlib import Path

import pytest

from moetrain.report.timeline import own_times, read_events, summarize, text


def event(name: str, begin: float, lasted: float, category: str = "cpu_op", thread: int = 1) -> dict:
    return {"ph": "X", "cat": category, "name": name, "pid": 1, "tid": thread, "ts": begin, "dur": lasted}


def record(run_dir: Path, step: int, rank: int, scale: float) -> None:
    events = [event("forward", 0, 60 * scale, "user_annotation"),
              event("backward", 60 * scale, 40 * scale, "user_annotation"),
              event("aten::linear", 0, 50 * scale), event("aten::mm", 10 * scale, 30 * scale),
              event("gloo:all_reduce", 0, 20 * scale, thread=2), {"ph": "i", "name": "a moment", "ts": 5}]
    path = run_dir / "log" / "timeline" / f"step-{step:08d}" / f"rank-{rank:04d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"traceEvents": events}))


def test_phases_and_operators_are_summed_over_steps_and_ranks(tmp_path: Path,
                                                              caplog: pytest.LogCaptureFixture,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("moetrain"), "propagate", True)
    for step in (2, 3):
        record(tmp_path, step, 0, 1000)
        record(tmp_path, step, 1, 3000)
    (tmp_path / "log/timeline/step-00000004").mkdir()
    (tmp_path / "log/timeline/step-00000004/rank-0000.json").write_text('{"traceEvents": [{"ph": "X"')
    rows = {row.name: row for row in summarize(tmp_path)}
    assert list(rows) == ["forward", "backward", "aten::mm", "aten::linear", "gloo:all_reduce"]
    forward = rows["forward"]
    assert (forward.kind, forward.calls) == ("phase", 1)
    assert (forward.fastest, forward.slowest, forward.seconds) == pytest.approx((0.06, 0.18, 0.12))
    assert forward.share == pytest.approx(0.6)
    assert rows["aten::linear"].seconds == pytest.approx(0.04)
    assert rows["gloo:all_reduce"].share == pytest.approx(0.2)
    assert len({record.getMessage() for record in caplog.records}) == 1 and "step-00000004" in caplog.text
    lines = text(list(rows.values())).splitlines()
    assert lines[1].split() == ["forward", "1", "120.00", "60.00", "180.00", "60.0%"]
    assert lines[3].startswith("operators")
    with (tmp_path / "report" / "timeline.csv").open(newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == list(rows)


def test_a_run_without_timeline_has_no_table(tmp_path: Path) -> None:
    assert summarize(tmp_path) == [] and not (tmp_path / "report").exists()


def test_own_time_is_without_what_is_inside(tmp_path: Path) -> None:
    record(tmp_path, 2, 0, 1)
    events = [one for one in read_events(tmp_path / "log/timeline/step-00000002/rank-0000.json")
              if one.category == "cpu_op"]
    assert sorted(own_times(events)) == [("aten::linear", 20), ("aten::mm", 30), ("gloo:all_reduce", 20)]
