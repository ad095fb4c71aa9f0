"""Weights & Biases that misbehaves neither stops nor delays a run."""

import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moetrain.train.loggers.wandb_settings import WandbSettings
from moetrain.train.loggers.wandb_sink import WandbSink

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
settings = WandbSettings("offline", "p", "n", None, None, (), None)
sink = WandbSink(settings, dir=Path(sys.argv[1]), close_s=0.5, queue_size=4)
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
    root = Path(__file__).parents[3]
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
