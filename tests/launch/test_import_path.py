"""Where ranks import from: never the current folder, always PYTHONPATH, and moetrain where it was found."""

import os
import sys
import threading
from pathlib import Path

import pytest

import moetrain
from moetrain.launch.local import program_environment, start_ranks
from moetrain.launch.node import Node
from moetrain.launch.supervisor import supervise

ROOT = Path(moetrain.__file__).parents[1]


@pytest.fixture
def trapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder whose random.py would run in place of the standard library's."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "random.py").write_text("open('hit', 'w')\n")
    return tmp_path


def test_local_ranks_from_a_thread_of_a_program(trapped: Path) -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(start_ranks(["version"], 2, trapped / "run")))
    thread.start()
    thread.join()
    assert codes == [0] and not (trapped / "hit").exists()


@pytest.mark.full
def test_ranks_of_torchrun(trapped: Path) -> None:
    node = Node(nodes=1, rank=0, head="", port=29400, nproc=1, restarts=0, timeout_s=60)
    assert supervise(node, ["version"], trapped / "run", None) == 0
    assert not (trapped / "hit").exists()


def test_what_is_on_the_path_stays_and_moetrain_is_found(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/a:/b")
    assert program_environment()["PYTHONPATH"].split(os.pathsep)[:2] == ["/a", "/b"]
    # A checkout that is not installed, run from its root
    monkeypatch.setattr(sys, "path", ["", str(tmp_path)])
    environment = program_environment()
    assert (environment["PYTHONPATH"].split(os.pathsep) == ["/a", "/b", str(ROOT)]
            and environment["PYTHONSAFEPATH"] == "1")
    monkeypatch.delenv("PYTHONPATH")
    # No empty entry: that would be the current folder
    assert program_environment()["PYTHONPATH"] == str(ROOT)
