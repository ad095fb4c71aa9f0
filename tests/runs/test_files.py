"""Lines of a record survive cuts and kills; full disks are in tests/integration/test_restart.py."""

import json
from pathlib import Path

import pytest

from moetrain.errors import DiskError
from moetrain.runs import files
from moetrain.runs.files import JsonlSink, prepare_rank_file
from tests.support.odd_files import ODD, make_odd


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_numbers_are_written_in_full(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.write({"step": 1, "loss/ce": 0.1 + 0.2})
    sink.write({"step": 2, "loss/ce": float("nan")})
    first, second = [json.loads(line) for line in sink.path.read_text().splitlines()]
    assert first["loss/ce"] == 0.1 + 0.2 and second["loss/ce"] != second["loss/ce"]


def test_cut_moves_the_tail_away_and_keeps_it(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    lost = tmp_path / "metrics.jsonl.lost"
    sink.cut_to(0)                                               # nothing there yet
    for step in range(1, 6):
        sink.write({"step": step})
    sink.cut_to(5)
    assert steps_in(sink.path) == [1, 2, 3, 4, 5] and not lost.exists()
    sink.cut_to(3)
    sink.write({"step": 4})
    sink.cut_to(2)
    assert steps_in(sink.path) == [1, 2] and steps_in(lost) == [4, 5, 3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "metrics.jsonl.lost"]


def test_a_line_that_a_kill_cut_off_is_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "loss')
    sink = JsonlSink(path)
    sink.cut_to(2)
    sink.write({"step": 2})
    assert steps_in(path) == [1, 2]
    path.write_bytes(b'{"step": 1}\n{"step": 2}')                # only its end of line is missing
    sink.cut_to(2)
    sink.write({"step": 3})
    assert steps_in(path) == [1, 2, 3]


@pytest.mark.parametrize("bad", [b"", b"{", b"null", b"[" * 20_000, b'{"step": 1e400}', b'{"step": "2"}',
                                 b'{"step": NaN}', b"\xff\xfe", b'{"step": [2]}', b"x" * 100])
def test_a_damaged_line_costs_that_line(tmp_path: Path, bad: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_LINE", 64)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + bad + b'\n{"step": 2}\n{"step": 3}\n')
    sink = JsonlSink(path)
    assert sink.has(2) and sink.has(3) and not sink.has(4)
    sink.cut_to(2)
    sink.write({"step": 3})
    assert steps_in(path) == [1, 2, 3]
    assert (tmp_path / "metrics.jsonl.lost").read_bytes() == bad + b'\n{"step": 3}\n'


@pytest.mark.parametrize("kind", ODD)
def test_a_record_that_is_no_file_is_named_at_once(tmp_path: Path, kind: str) -> None:
    what = make_odd(tmp_path / "eval.jsonl", kind)
    sink = JsonlSink(tmp_path / "eval.jsonl")
    for act in (lambda: sink.has(1), lambda: sink.cut_to(1), lambda: sink.write({"step": 1})):
        with pytest.raises(DiskError) as refused:
            act()
        assert what in refused.value.why and str(sink.path) in refused.value.where
    make_odd(tmp_path / "metrics.jsonl.lost", kind)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    with pytest.raises(DiskError, match="metrics.jsonl.lost"):
        JsonlSink(tmp_path / "metrics.jsonl").cut_to(1)
    assert steps_in(tmp_path / "metrics.jsonl") == [1, 2]


def test_a_file_that_cannot_be_written_is_a_disk_error(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="E-DISK"):
        JsonlSink(tmp_path / "absent" / "metrics.jsonl").write({"step": 1})


def test_files_of_ranks_that_are_gone_make_room_and_nothing_else_does(tmp_path):
    step = tmp_path / "step-00000001"
    step.mkdir()
    for name in ("rank-0000.json", "rank-0001.json", "rank-0002.json", "rank-0003.part",
                 "rank-0002-copy.json", "rank-0007 (1).json", "notes"):
        (step / name).write_text("")
    (step / "rank-0009.d").mkdir()
    prepare_rank_file(step / "rank-0001.json", 1, 2)
    assert len(list(step.iterdir())) == 8
    prepare_rank_file(step / "rank-0000.json", 0, 2)
    assert sorted(file.name for file in step.iterdir()) == [
        "notes", "rank-0000.json", "rank-0001.json", "rank-0002-copy.json", "rank-0007 (1).json",
        "rank-0009.d"]
