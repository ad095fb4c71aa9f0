"""Tools with --device cuda on a simulated device, at tiny sizes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import simulated_device
from tests.support.device_process import environment

UNAVAILABLE = simulated_device.unavailable()
pytestmark = pytest.mark.skipif(bool(UNAVAILABLE), reason=UNAVAILABLE or "there is one")

ROOT = Path(__file__).parents[2]
SMALL_OPS = ["--small", "--repeats=1"]


def tool(name: str, *words: str) -> str:
    """What it printed, both streams."""
    done = subprocess.run([sys.executable, "-m", f"tools.{name}", *words], cwd=ROOT, text=True, timeout=500,
                          env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, f"{name} ended with {done.returncode}:\n{done.stdout[-4000:]}"
    return done.stdout


def test_times_of_ops_are_written_with_the_name_of_the_device(tmp_path: Path) -> None:
    """Also where nvidia-smi is not installed, as in most containers."""
    out = tmp_path / "ops.json"
    said = tool("bench.ops", "--out", str(out), *SMALL_OPS, "--only=permute,swiglu", "--shapes=mixtral")
    record = json.loads(out.read_text())
    (process,) = record["processes"]
    assert process["chip"] == "Simulated CUDA device" and "meaningless" not in process
    assert {key.split()[0] for key in record["cells"]} == {"permute", "swiglu"} and "WRONG" not in said
    assert all("seconds" in cell or "absent" in cell for cell in record["cells"].values())
