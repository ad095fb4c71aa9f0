"""Ways to end a run on a real terminal: nothing is lost, and the way on is told."""

import os
import pty
import re
import shlex
from pathlib import Path

import pytest

from tests.support.jobs import Job

pytestmark = pytest.mark.slow


def read_to_end(terminal: int) -> str:
    """Everything a terminal shows until its process has gone."""
    text = b""
    while True:
        try:
            text += os.read(terminal, 65536)
        except OSError:                                  # EIO: nobody has the other side any more
            return text.decode()


def test_ctrl_c_on_a_terminal_saves_says_how_to_go_on_and_a_closed_terminal_saves_too(tmp_path: Path) -> None:
    """One process. The command that it prints is the one that is run next."""
    terminal, inner = pty.openpty()
    job = Job(tmp_path, "checkpoint.interval=0", "log.interval=1000", steps=100000,
              terminal=inner).wait_for(3)
    os.write(terminal, b"\x03")                          # Ctrl-C as a terminal sends it
    os.close(inner)
    shown = read_to_end(terminal)
    assert job.wait() == 10, shown
    (stopped,) = [int(step)
                  for step in re.findall(r"E-PREEMPTED-001 .* saved after step (\d+) of 100000", shown)]
    assert stopped == job.steps()[-1] == job.status()["step"] and job.status()["code"] == 10
    assert "[stop] SIGINT (Ctrl-C): saving after this step" in shown and "Traceback" not in shown
    (command,) = re.findall(r"^  try     (moetrain train .*?)\r?$", shown, re.MULTILINE)

    terminal, inner = pty.openpty()
    again = Job(tmp_path, terminal=inner, command=shlex.split(command)[1:]).wait_for(stopped + 3)
    os.close(inner)
    # The window is closed: SIGHUP, and nothing can be written any more
    os.close(terminal)
    assert again.wait() == 10 and again.status()["code"] == 10
    assert (again.run_dir / "checkpoints" / f"step-{again.steps()[-1]:08d}" / "manifest.json").exists()
    assert again.steps() == list(range(1, again.steps()[-1] + 1))
