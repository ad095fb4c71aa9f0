"""Picture of expert loads: its headline, its tables, and damaged input."""

import csv
import os
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

from moetrain.errors import DataError, DiskError
from moetrain.report.loads import draw_loads, headline, last_steps, read_loads, snapshots
from moetrain.report.run import draw
from moetrain.runs.expert_loads import LoadsLog
from tests.support.odd_files import ODD, make_odd


def write(run_dir: Path, counts: list, experts: list[int]) -> Path:
    """Write a run with these counts, [steps][routers][E]."""
    log = LoadsLog(run_dir / "log" / "loads")
    for step, loads in enumerate(counts, 1):
        log.write(step, loads)
    log.name_routers({f"layers.{r}.moe": count for r, count in enumerate(experts)})
    log.write_npz(run_dir / "loads.npz")
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
    assert violation[-1] == {"step": "20", "layers.0.moe": "1", "layers.1.moe": "0.5"}
    assert len(violation) == 20


def test_the_title_states_the_finding(tmp_path: Path) -> None:
    loads = read_loads(write(tmp_path / "a", [[[10, 30, 0, 0]]], [4]) / "loads.npz")
    assert headline(loads, slice(0, 1)) == "Heaviest expert carries 3.0x the mean; 2 of 4 experts are dead"
    loads = read_loads(write(tmp_path / "b", [[[10, 14, 6], [5, 5]]], [3, 2]) / "loads.npz")
    assert headline(loads, slice(0, 1)) == (
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


GOOD = {"loads": np.arange(1, 13).reshape(2, 2, 3), "experts": np.array([3, 2]),
        "routers": np.array(["a", "b"]), "steps": np.array([1, 2])}
FORMS = [
    *({name: None} for name in GOOD),                            # missing
    *({name: np.array(GOOD[name].tolist(), dtype=object)} for name in GOOD),
    *({name: GOOD[name].astype(str)} for name in ("loads", "experts", "steps")),
    {"routers": np.array([1, 2])},
    {"loads": GOOD["loads"].astype(float)}, {"loads": np.full((2, 2, 3), np.nan)},
    {"loads": np.zeros((2, 2, 3), complex)},
    {"loads": GOOD["loads"][0]}, {"loads": np.int64(3)}, {"loads": GOOD["loads"][:1]},
    {"loads": GOOD["loads"][:, :1]},
    {"loads": np.zeros((2, 2, 0), int)}, {"loads": np.zeros((0, 2, 3), int)}, {"loads": -GOOD["loads"]},
    {"loads": np.asfortranarray(GOOD["loads"])}, {"loads": np.zeros((2, 2, 3), [("a", int)])},
    {"loads": np.zeros((2, 2, 3), bool)},
    {"experts": np.array([4, 2])}, {"experts": np.array([0, 2])}, {"experts": np.array([-1, 2])},
    {"experts": np.array([3, 2, 1])},
    {"experts": np.array([3.0, 2.0])}, {"experts": np.array([[3], [2]])}, {"routers": np.array(["a"])},
    {"routers": np.array([b"a", b"b"])},
    {"steps": np.array([2, 1])}, {"steps": np.array([1, 1])}, {"steps": np.array([1])},
    {"steps": np.array([1.0, np.nan])}, {"steps": np.array(["2020-01-01", "2021-01-01"], "datetime64[D]")},
]


@pytest.mark.parametrize(
    "form", FORMS, ids=lambda form: f"{next(iter(form))}-{getattr(next(iter(form.values())), 'dtype', None)}")
def test_arrays_of_another_form_are_refused(tmp_path: Path, form: dict[str, object]) -> None:
    arrays = {name: array for name, array in (GOOD | form).items() if array is not None}
    np.savez(tmp_path / "loads.npz", **arrays)
    with pytest.raises(DataError) as refused:
        read_loads(tmp_path / "loads.npz")
    assert refused.value.code == 12 and str(tmp_path) in refused.value.where and refused.value.why


def npy(shape: tuple[int, ...], content: bytes = b"") -> bytes:
    """Encode an array whose header claims this shape."""
    file = BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": shape})
    return file.getvalue() + content


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "loads.npz"
    np.savez(path, **GOOD)
    whole, chance = path.read_bytes(), np.random.default_rng(0)
    assert read_loads(path).routers == ["a", "b"]
    damaged = [b"", b"PK\x03\x04 damaged", npy((2, 2, 3), bytes(96)), whole[:len(whole) // 2], b"{}"]
    for _ in range(100):
        content = bytearray(whole)
        for place in chance.integers(0, len(whole), 8):
            content[place] = chance.integers(256)
        damaged.append(bytes(content))
    for content in damaged:
        path.write_bytes(content)
        try:
            assert content not in damaged[:5] or read_loads(path) is None
            read_loads(path)
        except DataError as refused:
            assert refused.code == 12
    for member in (npy((1 << 40, 2, 3)), npy((2, 2, 3)), npy((-2, 2, 3)), b"",
                   b"\x93NUMPY\x09\x00" + bytes(20)):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("loads.npy", member)
        with pytest.raises(DataError, match="E-DATA-060"):       # before memory is asked for
            read_loads(path)
    for kind in ODD:
        what = make_odd(path, kind)
        with pytest.raises(DataError, match=what):
            read_loads(path)
        path.rmdir() if kind == "folder" else path.unlink()


@pytest.mark.parametrize("name", ["report", "report/expert_load.csv", "report/expert_load.png", "loads.npz"])
def test_a_report_that_cannot_be_written_names_the_cause(tmp_path: Path, name: str) -> None:
    write(tmp_path, [[[10, 30, 0, 0]]], [4])
    place = tmp_path / name
    if name == "report":
        place.write_text("a file where a folder is to be")
    else:
        place.unlink(missing_ok=True)
        place.mkdir(parents=True)
        (place / "inside").touch()
    with pytest.raises(DiskError) as refused:
        draw(tmp_path)
    assert refused.value.id == "E-DISK-041" and str(place) in refused.value.where and refused.value.why


def test_the_report_of_a_run_that_goes_on_has_its_newest_step(tmp_path: Path) -> None:
    write(tmp_path, [[[10, 30, 0, 0]]], [4])
    log = LoadsLog(tmp_path / "log" / "loads")
    log.write(2, [[1, 1, 1, 1]])
    assert read_loads(tmp_path / "loads.npz").steps.tolist() == [1]
    os.utime(tmp_path / "loads.npz", (0, 0))
    draw(tmp_path)
    assert read_loads(tmp_path / "loads.npz").steps.tolist() == [1, 2]
    assert log.is_built(tmp_path / "loads.npz")


def test_what_cannot_be_drawn_says_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        draw_loads(tmp_path)
    (tmp_path / "loads.npz").write_bytes(b"PK\x03\x04 damaged")
    with pytest.raises(DataError, match="cannot be read"):
        draw_loads(tmp_path)
    with pytest.raises(DataError, match="0 routers"):
        draw_loads(write(tmp_path / "dense", [[]], []))
