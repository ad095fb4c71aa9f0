"""Output that cannot be written: real descriptors, real processes, no torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KEEP_OPEN = "from moetrain import streams; streams.keep_open()\n"


def outcome(script: str, redirect: str = "", verb: str = "") -> tuple[int, str]:
    """Exit code and output of Python running a script behind keep_open, or a verb."""
    words = ["-m", "moetrain", verb] if verb else ["-c", KEEP_OPEN + script]
    done = subprocess.run(["bash", "-c", f'"$0" "$@" {redirect}', sys.executable, *words], cwd=ROOT,
                          timeout=60, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.returncode, done.stdout


WRITES = """
import sys, os
streams.outlive()
for line in range(2000):
    print("line", line, flush=True)
    print("error", line, file=sys.stderr)
assert os.open("/dev/null", os.O_RDONLY) > 2
open(os.environ.get("KEPT", "/dev/null"), "w").write("kept")
sys.exit(3)
"""


@pytest.mark.parametrize("redirect", [
    "> /dev/full", "> /dev/full 2>&1", ">&-", ">&- 2>&-", "<&- >&- 2>&-", "| head -3; exit ${PIPESTATUS[0]}",
    "2>&1 | head -3; exit ${PIPESTATUS[0]}"])
def test_a_process_goes_on_without_its_output(
        redirect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEPT", str(tmp_path / "kept"))
    code, shown = outcome(WRITES, redirect)
    assert code == 3 and (tmp_path / "kept").read_text() == "kept"
    assert "Traceback" not in shown and "Exception ignored" not in shown and "Errno" not in shown


def test_a_reader_that_sleeps_is_waited_for_once_and_told_what_it_missed() -> None:
    script = """
import sys, time
streams.WAIT_S = 0.5
streams.outlive()
for line in range(10000):
    print("line", line, flush=True)
print(time.monotonic(), file=sys.stderr, flush=True)
sys.stdin.read()
print("the end")
"""
    process = subprocess.Popen([sys.executable, "-c", KEEP_OPEN + script], cwd=ROOT,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert float(process.stderr.readline())              # it got to the end though nobody reads
    shown = os.read(process.stdout.fileno(), 1 << 20)    # all that a pipe holds
    rest, _ = process.communicate(timeout=60)
    shown = (shown + rest).decode()
    assert process.returncode == 0 and shown.startswith("line 0\nline 1\n")
    assert "bytes of output could not be written here\nthe end\n" in shown


def test_what_a_verb_prints_is_its_product() -> None:
    code, shown = outcome("", "> /dev/full", verb="version")
    assert code == 14 and shown.count("E-DISK-030") == 1
    assert "No space left" in shown and "Traceback" not in shown
    assert outcome("", "| head -1; exit ${PIPESTATUS[0]}", verb="--help")[0] == 0
    assert outcome("", ">&-", verb="--help") == (0, "")
