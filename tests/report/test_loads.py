"""The picture of tokens per expert says what the numbers say."""

import csv
from pathlib import Path

import numpy as np
import pytest

from moetrain.errors import DataError
from moetrain.report.loads import draw_loads, finding, last_steps, read_loads, snapshots
from moetrain.train.sinks import LoadsLog


def write(run_dir: Path, counts: list, experts: list[int]) -> Path:
    """A run with these counts [steps][routers][E]."""
    log = LoadsLog(run_dir / "log" / "loads")
    for step, loads in enumerate(counts, 1):
        log.write(step, loads)
    log.write_npz(run_dir / "loads.npz", [f"layers.{r}.moe" for r in range(len(experts))], experts)
    return run_dir


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_draws_a_picture_with_its_values_beside_it(tmp_path: Path) -> None:
    counts = [[[10, 10, 10, 10], [30, 10]]] * 18 + [[[0, 20, 10, 10], [30, 10]]] * 2
    picture = draw_loads(write(tmp_path, counts, [4, 2]))
    assert picture == tmp_path / "report" / "expert_load.png" and picture.read_bytes().startswith(b"\x89PNG")
    table = rows(tmp_path / "report" / "expert_load.csv")
    assert [(row["router"], row["expert"]) for row in table] == [
        *(("layers.0.moe", str(e)) for e in range(4)), ("layers.1.moe", "0"), ("layers.1.moe", "1")]
    end = [float(row["load, steps 19-20 (the end)"]) for row in table]
    assert end == [0, 2, 1, 1, 1.5, 0.5] and table[1]["tokens per step at the end"] == "20"
    assert float(table[0]["load, steps 1-4"]) == 1
    violation = rows(tmp_path / "report" / "max_violation.csv")
    assert violation[-1] == {"step": "20", "layers.0.moe": "1", "layers.1.moe": "0.5"} and len(violation) == 20


def test_the_title_states_the_finding(tmp_path: Path) -> None:
    loads = read_loads(write(tmp_path / "a", [[[10, 30, 0, 0]]], [4]) / "loads.npz")
    assert finding(loads, slice(0, 1)) == "Heaviest expert carries 3.0x the mean; 2 of 4 experts are dead"
    loads = read_loads(write(tmp_path / "b", [[[10, 14, 6], [5, 5]]], [3, 2]) / "loads.npz")
    assert finding(loads, slice(0, 1)) == (
        "Heaviest expert carries 1.4x the mean (layers.0.moe, expert 1); no dead experts")


@pytest.mark.parametrize("steps, experts", [(1, [256, 128]), (3, [1]), (60, [8] * 30)])
def test_draws_runs_of_any_shape(steps: int, experts: list[int], tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    counts = [[generator.integers(0, 5, e) for e in experts] for _ in range(steps)]
    counts[0][0][:] = 0                                          # a router that nothing reached
    draw_loads(write(tmp_path, counts, experts))
    violation = rows(tmp_path / "report" / "max_violation.csv")
    assert violation[0]["layers.0.moe"] == "0"


def test_windows_cover_the_run() -> None:
    assert [last_steps(n) for n in (1, 30, 5000)] == [slice(0, 1), slice(27, 30), slice(4900, 5000)]
    for n in (1, 2, 7, 1000):
        windows = snapshots(n)
        assert windows[0].start == 0 and windows[-1].stop == n and all(w.stop > w.start for w in windows)
        assert all(a.stop == b.start for a, b in zip(windows, windows[1:]))


def test_what_cannot_be_drawn_says_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        draw_loads(tmp_path)
    (tmp_path / "loads.npz").write_bytes(b"PK\x03\x04 damaged")
    with pytest.raises(DataError, match="cannot be read"):
        draw_loads(tmp_path)
    with pytest.raises(DataError, match="0 routers"):
        draw_loads(write(tmp_path / "dense", [[]], []))
