"""The first hour on a GPU: its stages end, leave results and are not repeated; without a GPU it says so."""

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from tests.support import device_process, simulated_device
from tools.check import gpu, gpu_stages, stages
from tools.check.stages import FAILED, PASSED, UNFINISHED, Check, Stage

ROOT = Path(__file__).parents[2]
needs_a_simulated_gpu = pytest.mark.skipif(bool(simulated_device.unavailable()),
                                           reason=simulated_device.unavailable() or "there is one")


def bash(name: str, script: str, **more) -> Stage:
    return Stage(name, name, [["bash", "-c", script]], usual_s=1, **more)


def check(out: Path, *of: Stage, machine: str = "H200") -> Check:
    made = Check(of, out, "bash tools/check/gpu.sh", "abc123")
    made.on(machine)
    return made


def soon() -> float:
    return time.monotonic() + 60


def test_what_has_passed_is_not_repeated_and_what_failed_comes_after_the_rest(tmp_path):
    out, order = tmp_path / "gpu", tmp_path / "order"
    out.mkdir()
    # Each looks for the result of the one before it: results are written after every stage.
    of = [bash("one", f"echo one >> {order}; echo done"),
          bash("two", f"echo two >> {order}; grep -q '\"one\"' {out}/results.json; [ -e {out}/repaired ]"),
          bash("three", f"echo three >> {order}; grep -q '\"two\"' {out}/results.json"),
          bash("named", "true", on_request=True), bash("never", "false", skipped=lambda: "no nvcc")]
    assert check(out, *of).run([], soon()) == FAILED
    again = check(out, *of, bash("four", f"echo four >> {order}"))
    assert again.summary().count("not run yet") == 1
    (out / "repaired").touch()
    assert again.run([], soon()) == PASSED
    assert order.read_text().split() == ["one", "two", "three", "four", "two"]
    assert again.run(["one"], soon()) == PASSED
    assert order.read_text().endswith("two\none\n")     # it was named, so it ran again
    results = json.loads((out / "results.json").read_text())["stages"]
    assert results["never"]["state"] == "skipped" and results["never"]["note"] == "no nvcc"
    assert "named" not in results
    assert results["one"]["note"] == "done" and results["one"]["sources"] == "abc123"
    assert check(out, *of, machine="H100").results == {}                     # results of another machine


def test_a_stage_ends_in_time_with_all_that_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "LIMIT_S", 1)
    monkeypatch.setattr(stages, "END_S", 0.2)
    # set -m: a job has a process group of its own, as ranks have.
    slow = check(tmp_path, bash(
        "deaf", f"trap '' TERM; set -m; sleep 60 & echo $! > {tmp_path}/pid; while :; do wait; done"))
    assert slow.run([], soon()) == FAILED and "not finished after 1 s" in slow.results["deaf"]["note"]
    assert gone(int((tmp_path / "pid").read_text()))


def gone(process: int) -> bool:
    """Whether a process has ended, reaped or not. A signal takes a moment to arrive on a busy machine."""
    limit = time.monotonic() + 10
    try:
        while Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            if time.monotonic() > limit:
                return False
            time.sleep(0.01)
    except OSError:
        pass
    return True


def test_the_end_of_a_call_interrupts_and_too_little_time_begins_nothing(tmp_path):
    late = check(tmp_path, bash("longer", "true")._replace(usual_s=30), bash("long", "sleep 60"))
    assert late.run([], time.monotonic() + 1.2) == UNFINISHED
    assert late.state("long") == "interrupted" and late.state("longer") == ""
    assert "to go on with 2 of 2 stages" in late.summary()


def test_a_signal_leaves_results_and_the_archive(tmp_path):
    stopped = check(tmp_path, bash("one", "true"),
                    bash("two", f"echo $$ > {tmp_path}/pid; kill -TERM {os.getpid()}; sleep 60"))
    before = signal.getsignal(signal.SIGTERM)
    assert stopped.run([], soon()) == 128 + signal.SIGTERM and signal.getsignal(signal.SIGTERM) is before
    assert stopped.results["two"]["note"] == "by SIGTERM" and gone(int((tmp_path / "pid").read_text()))
    with tarfile.open(stopped.archive) as archive:
        names = {Path(name).name for name in archive.getnames()}
    assert names == {"results.json", "summary.txt", "one.log", "two.log"}
    assert str(stopped.archive) in stopped.summary()


def test_the_summary_shows_the_lines_that_matter(tmp_path):
    arms = ("echo '[1/2] given   equal'; echo '[2/2] other   DIFFERS first steps'; "
            "for i in {1..9}; do echo $i; done; exit 1")
    failed = check(tmp_path, bash("arms", arms), bash("quiet", "echo first; echo last; exit 3"),
                   bash("tests", "echo '2 skipped in 0.1s'", counts=gpu_stages.TESTED))
    assert failed.run([], soon()) == FAILED
    assert "    [2/2] other   DIFFERS first steps" in failed.summary() and "    9" not in failed.summary()
    assert "exit code 3: last" in failed.summary() and "    first" in failed.summary()
    assert failed.results["tests"]["note"] == "nothing was tested: 2 skipped in 0.1s"
    lines = ["Traceback (most recent call last):",
             "torch.AcceleratorError: CUDA error: an illegal memory access", "E-CONFIG-090  no GPU",
             "FAILED tests/ops/test_kernels_on_gpu.py::test_router", "  where   run.device"]
    assert stages.matters(lines) == lines[1:4]


def test_two_calls_are_enough_and_every_test_of_the_kernels_has_a_stage(tmp_path):
    made = gpu_stages.GpuStages(tmp_path, tiny=False).all()
    asked = [stage for stage in made if not stage.on_request]
    assert sum(stage.usual_s for stage in asked) <= 2 * 60 * gpu.MINUTES
    assert all(stage.usual_s < stages.LIMIT_S for stage in made)
    assert len({stage.name for stage in made}) == len(made)
    file = ROOT / "tests/ops/test_kernels_on_gpu.py"
    tests = re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)
    for chosen in gpu_stages.OPS.values():
        assert all(any(word in name for name in tests) for word in chosen.split(" or "))
    for stage in made:                                   # files that commands name are there
        for word in (word for command in stage.commands for word in command
                     if re.match(r"(tools|tests)/\S+\.py$", word)):
            assert (ROOT / word).is_file(), word


def run(out: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "tools/check/gpu.sh", "--out", str(out), *arguments]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=1800,
                          env={**os.environ, "PYTHON": sys.executable, **environment})


@needs_a_simulated_gpu
def test_without_a_gpu_it_says_so_and_ends_with_a_code_of_its_own(tmp_path):
    done = run(tmp_path / "gpu")
    assert done.returncode == 4 and done.stdout.count("\n") == 2 and not done.stderr
    assert re.search(r"no GPU: torch \S+ is a CPU build; \S+", done.stdout)
    names = {path.name for path in (tmp_path / "gpu").iterdir()}
    assert names == {"environment.log", "results.json", "summary.txt", "gpu.tar.gz"}
    wrong = run(tmp_path / "other", "--only", "tarin-ep")
    assert wrong.returncode == 2 and "no stage tarin-ep" in wrong.stderr and not (tmp_path / "other").exists()
    listed = run(tmp_path / "gpu", "--list")
    assert listed.returncode == 0 and re.search(r"^environment +failed", listed.stdout, re.MULTILINE)


@pytest.mark.full
@needs_a_simulated_gpu
def test_every_stage_runs_to_its_last_line_on_a_simulated_gpu(tmp_path):
    devices = device_process.environment()
    done = run(tmp_path / "gpu", "--tiny", "--minutes", "60", **devices)
    results = json.loads((tmp_path / "gpu" / "results.json").read_text())["stages"]
    assert done.returncode == 0, (tmp_path / "gpu" / "summary.txt").read_text()
    kernels = {name for name in results if name.startswith(("build", "kernels-"))}
    kernels |= {"train-kernels", "train-peers"}
    assert {name for name, result in results.items() if result["state"] == "skipped"} == kernels
    assert {name for name, result in results.items() if result["state"] == "passed"} >= {
        "environment", "quickstart", *(f"train-{mesh}" for mesh in gpu_stages.MESHES),
        *(f"bench-{what}" for what in ("ops", "layer", "balance"))}
    for mesh in gpu_stages.MESHES:
        found = tmp_path / "gpu" / f"train-{mesh}-float32" / "parity.json"
        (result,) = json.loads(found.read_text()).values()
        assert result["equal"] and result["counts"] == "the same"
    with tarfile.open(tmp_path / "gpu" / "gpu.tar.gz") as archive:
        names = set(archive.getnames())
    assert {"gpu/summary.txt", "gpu/ops.json", "gpu/train-ep-float32/given/metrics.jsonl"} <= names
    assert not [name for name in names if name.endswith(".safetensors")]
    again = run(tmp_path / "gpu", "--tiny", **devices)
    # Nothing is left to do but the first look.
    assert again.returncode == 0 and "train-ep:" not in again.stdout
