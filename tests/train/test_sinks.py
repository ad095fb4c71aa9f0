"""Records survive cuts, kills and a tracker that misbehaves."""

import logging
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from moetrain.train.loggers import wandb_sink as sinks
from moetrain.train.loggers.wandb_settings import WandbSettings
from moetrain.runs.expert_loads import LoadsLog
from moetrain.train.loggers.wandb_sink import WandbSink
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


@pytest.mark.parametrize("name", ["00000001-9x9-0.i32", "00000002-2x3-0.i32", "00000000-0x0-0.i32", "1-2x3-0.i32", "mine.i32",
                                  "99999999-999999x999999-999999.i32"])
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


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": 1e400}', '{"a": -1}', '{"a": []}', "[" * 10_000, "null"])
def test_damaged_names_of_routers_leave_the_old_file(tmp_path: Path, content: str) -> None:
    log = LoadsLog(tmp_path / "loads")
    log.write(1, load(1))
    before = read(log)["steps"].tolist()
    (tmp_path / "loads" / "routers.json").write_text(content)
    assert not log.write_npz(tmp_path / "loads.npz")
    with np.load(tmp_path / "loads.npz") as file:
        assert file["steps"].tolist() == before


def test_building_holds_a_few_records_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "BLOCK_BYTES", 60)                # two records of 28 bytes
    log = LoadsLog(tmp_path / "loads")
    for step in range(1, 8):
        log.write(step, load(step), by_rank(step, 2) if step > 4 else None) if step != 5 else None
        if step == 5:
            log = LoadsLog(tmp_path / "loads")
            log.write(step, load(step), by_rank(step, 2))
    arrays = read(log)
    assert arrays["steps"].tolist() == list(range(1, 8)) and arrays["loads"][:, 1, 0].tolist() == [10 * s for s in range(1, 8)]
    assert (arrays["sources"][:4] == -1).all() and arrays["sources"][4:, 0, 0, 0].tolist() == [5, 6, 7]


# --- WandbSink

SETTINGS = WandbSettings("offline", "p", "n", None, "g", ("t",), None)

FAKE = {
    "hanging": "import time; time.sleep(1000)",
    "failing": "raise OSError('broken\\ninstallation')",
    "exiting": "import sys; sys.exit(3)",
    "hanging at exit": """
import atexit, time
class Run:
    def log(self, values, step): print("logged", step, values, flush=True)
    def finish(self): print("finished", flush=True)
def init(**arguments):
    atexit.register(time.sleep, 1000)
    return Run()
def Settings(**arguments): return arguments
""",
    "hanging in finish": """
import atexit, time
class Run:
    def log(self, values, step): pass
    def finish(self): time.sleep(1000)
def init(**arguments):
    atexit.register(time.sleep, 1000)
    return Run()
def Settings(**arguments): return arguments
""",
}
SCRIPT = """
import logging, sys, time
from pathlib import Path
logging.basicConfig(format="[warn] %(message)s", level=logging.WARNING, stream=sys.stdout)
from moetrain.train.loggers.wandb_settings import WandbSettings
from moetrain.train.loggers.wandb_sink import WandbSink
started = time.monotonic()
sink = WandbSink(WandbSettings("offline", "p", "n", None, None, (), None), dir=Path(sys.argv[1]), close_s=0.5, queue_size=4)
sink.write({"step": 1, "loss/ce": 2.0})
time.sleep(float(sys.argv[2]))
for step in range(2, 6):
    sink.write({"step": step, "loss/ce": 2.0})
sink.close()
assert time.monotonic() - started < 2.5
print("trained")
"""


@pytest.mark.parametrize("kind, reason", [
    ("hanging", "does not keep up"), ("failing", "OSError: broken"), ("exiting", "SystemExit: 3"),
    ("hanging in finish", "did not finish within 0.5 s"),
])
def test_wandb_that_misbehaves_gives_one_warning_and_no_delay(kind: str, reason: str, tmp_path: Path) -> None:
    output = run_with_fake(kind, tmp_path, pause=0.5 if kind != "hanging" else 0)
    warnings = [line for line in output.splitlines() if line.startswith("[warn]")]
    assert len(warnings) == 1 and reason in warnings[0], output
    assert output.endswith("trained\n")


def test_wandb_receives_records_and_cannot_delay_the_exit(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    output = run_with_fake("hanging at exit", tmp_path, pause=0.3)
    assert "logged 1 {'loss/ce': 2.0}" in output and "finished" in output


def run_with_fake(kind: str, tmp_path: Path, pause: float) -> str:
    """Standard output of a training process that finds this fake as `wandb`."""
    (tmp_path / "wandb.py").write_text(FAKE[kind])
    (tmp_path / "script.py").write_text(SCRIPT)
    root = Path(__file__).parents[2]
    started = time.monotonic()
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path), str(pause)]
    done = subprocess.run(command, cwd=root, env={"PYTHONPATH": f"{tmp_path}:{root}"}, timeout=60,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - started < 15 and not done.stderr, done.stderr
    return done.stdout


def test_wandb_that_is_absent_gives_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)              # what import sees when it is not installed
    monkeypatch.setattr(logging.getLogger("moetrain"), "propagate", True)
    sink = WandbSink(SETTINGS, dir=tmp_path)
    for step in range(1, 2000):
        sink.write({"step": step})
    sink.close()
    assert len(caplog.records) == 1 and "wandb" in caplog.text and "the run goes on" in caplog.text


@pytest.mark.slow
def test_wandb_offline_writes_a_run_and_a_resumed_one_has_its_id(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    for _ in range(2):
        sink = WandbSink(SETTINGS, dir=tmp_path, config={"run": {"name": "n"}}, close_s=15)
        sink.write({"step": 1, "loss/ce": 2.0})
        sink.close()
    files = {path.name for path in tmp_path.glob("wandb/offline-run-*/*.wandb")}
    assert files == {f"run-{(tmp_path / 'wandb' / 'id').read_text()}.wandb"}
