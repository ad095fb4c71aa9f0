"""Recorded expert loads survive cuts, kills and damage."""

import logging
from pathlib import Path

import numpy as np
import pytest

from moetrain.runs import expert_loads
from moetrain.runs.expert_loads import LoadsLog
from tests.support.odd_files import ODD, make_odd


def load(step: int) -> list[np.ndarray]:
    """Two routers with 3 and 2 experts."""
    return [np.array([step, 1, 2]), np.array([10 * step, 5])]


def by_rank(step: int, ranks: int) -> list[np.ndarray]:
    return [np.stack([entry, *[np.zeros_like(entry)] * (ranks - 1)]) for entry in load(step)]


def read(log: LoadsLog) -> dict[str, np.ndarray]:
    log.name_routers({"layers.0.moe": 3, "layers.1.moe": 2})
    assert log.write_npz(log.dir.parent / "loads.npz")
    with np.load(log.dir.parent / "loads.npz") as file:          # numpy refuses pickles here
        return dict(file)


def test_npz_holds_what_was_appended(tmp_path: Path) -> None:
    log = LoadsLog(tmp_path / "loads")
    for step in (1, 2, 3):
        log.write(step, load(step))
    arrays = read(log)
    assert set(arrays) == {"loads", "experts", "routers", "steps"}
    assert arrays["loads"].dtype == np.int64 and arrays["loads"].shape == (3, 2, 3)
    assert arrays["loads"][1].tolist() == [[2, 1, 2], [20, 5, 0]]
    assert arrays["experts"].tolist() == [3, 2] and arrays["steps"].tolist() == [1, 2, 3]
    assert arrays["routers"].tolist() == ["layers.0.moe", "layers.1.moe"]


def test_npz_of_nothing_has_the_right_shapes(tmp_path: Path) -> None:
    assert read(LoadsLog(tmp_path / "loads"))["loads"].shape == (0, 2, 3)
    dense = LoadsLog(tmp_path / "dense")
    dense.write(1, [])
    dense.name_routers({})
    assert dense.write_npz(tmp_path / "dense.npz")
    with np.load(tmp_path / "dense.npz") as file:
        assert file["loads"].shape == (1, 0, 0) and file["steps"].tolist() == [1]


def test_a_resumed_run_continues_the_counts(tmp_path: Path) -> None:
    first = LoadsLog(tmp_path / "loads")
    for step in range(1, 6):
        first.write(step, load(step))
    for path in first.dir.iterdir():                             # killed in the middle of a record
        with path.open("ab") as file:
            file.write(b"\1\2\3")
    second = LoadsLog(tmp_path / "loads")
    second.cut_to(3)
    for step in (4, 5, 6):
        second.write(step, load(step))
    arrays = read(second)
    assert arrays["steps"].tolist() == [1, 2, 3, 4, 5, 6]
    assert arrays["loads"][:, 1, 0].tolist() == [10, 20, 30, 40, 50, 60]
    third = LoadsLog(tmp_path / "loads")
    third.cut_to(2)                                              # the second chunk goes as a whole
    assert read(third)["steps"].tolist() == [1, 2]
    assert sum(path.suffix == ".lost" for path in third.dir.iterdir()) == 2
    third.cut_to(0)
    third.write(1, load(7))
    assert read(third)["loads"][0, 0, 0] == 7


def test_sources_follow_a_change_of_ranks(tmp_path: Path) -> None:
    for step, ranks in ((1, 0), (2, 2), (3, 4)):
        log = LoadsLog(tmp_path / "loads")
        log.cut_to(step - 1)
        log.write(step, load(step), by_rank(step, ranks) if ranks else None)
    sources = read(log)["sources"]
    assert sources.shape == (3, 2, 4, 3)                         # steps, routers, ranks, E_max
    assert (sources[0] == -1).all() and sources[1, 0].tolist() == [[2, 1, 2], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert sources[2, 1, 0].tolist() == [30, 5, 0]


DAMAGES = {
    "a step": (slice(28, 32), 99), "a load": (slice(32, 36), -5), "the last record": (slice(56, 60), 0),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_costs_that_record(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("moetrain"), "propagate", True)
    log = LoadsLog(tmp_path / "loads")
    for step in (1, 2, 3):
        log.write(step, load(step))
    (path,) = log.dir.glob("*.i32")
    content, (where, value) = bytearray(path.read_bytes()), DAMAGES[damage]
    content[where] = value.to_bytes(4, "little", signed=True)
    path.write_bytes(content)
    assert read(log)["steps"].tolist() == ([1, 2] if damage == "the last record" else [1, 3])
    assert "1 records are damaged" in caplog.text
    again = LoadsLog(tmp_path / "loads")
    again.cut_to(3)
    again.write(4, load(4))
    assert read(again)["steps"][-1] == 4


@pytest.mark.parametrize("name", ["00000001-9x9-0.i32", "00000002-2x3-0.i32", "00000000-0x0-0.i32",
                                  "1-2x3-0.i32", "mine.i32", "99999999-999999x999999-999999.i32"])
def test_a_stray_file_changes_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / "loads").mkdir()
    (tmp_path / "loads" / name).write_bytes(b"\1\0\0\0" * 70)
    for start in (1, 3):
        log = LoadsLog(tmp_path / "loads")
        log.cut_to(start - 1)
        for step in range(start, start + 2):
            log.write(step, load(step))
    arrays = read(log)
    assert arrays["steps"].tolist() == [1, 2, 3, 4] and arrays["loads"][:, 1, 0].tolist() == [10, 20, 30, 40]


@pytest.mark.parametrize("kind", [*ODD, "link"])
def test_what_is_no_file_of_the_log_is_left_alone(tmp_path: Path, kind: str) -> None:
    (tmp_path / "loads").mkdir()
    path = tmp_path / "loads" / "00000001-2x3-0.i32"
    if kind == "link":
        (tmp_path / "elsewhere").write_bytes(b"precious")
        path.symlink_to(tmp_path / "elsewhere")
    else:
        make_odd(path, kind)
    log = LoadsLog(tmp_path / "loads")
    log.cut_to(0)
    log.write(2, load(2))
    assert read(log)["steps"].tolist() == [2]
    assert kind != "link" or (tmp_path / "elsewhere").read_bytes() == b"precious"


@pytest.mark.parametrize("content",
                         ["", "[]", "{", '{"a": 1e400}', '{"a": -1}', '{"a": []}', "[" * 10_000, "null"])
def test_damaged_names_of_routers_leave_the_old_file(tmp_path: Path, content: str) -> None:
    log = LoadsLog(tmp_path / "loads")
    log.write(1, load(1))
    before = read(log)["steps"].tolist()
    (tmp_path / "loads" / "routers.json").write_text(content)
    assert not log.write_npz(tmp_path / "loads.npz")
    with np.load(tmp_path / "loads.npz") as file:
        assert file["steps"].tolist() == before


def test_building_holds_a_few_records_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_loads, "BLOCK_BYTES", 60)                # two records of 28 bytes
    log = LoadsLog(tmp_path / "loads")
    for step in range(1, 8):
        log.write(step, load(step), by_rank(step, 2) if step > 4 else None) if step != 5 else None
        if step == 5:
            log = LoadsLog(tmp_path / "loads")
            log.write(step, load(step), by_rank(step, 2))
    arrays = read(log)
    assert arrays["steps"].tolist() == list(range(1, 8))
    assert arrays["loads"][:, 1, 0].tolist() == [10 * s for s in range(1, 8)]
    assert (arrays["sources"][:4] == -1).all() and arrays["sources"][4:, 0, 0, 0].tolist() == [5, 6, 7]


# --- WandbSink
