"""The exit code of a run, from torchrun's, status.json and the signals that came."""

import json
import os
import signal
from pathlib import Path

import pytest

from moetrain.launch.status import write_status
from moetrain.launch.supervisor import StatusFile, run_exit_code
from tests.support.odd_files import ODD, make_odd

TERM, USR1, INT = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT


@pytest.mark.parametrize("returned, status, signals, code", [
    (0, 0, [], 0), (0, None, [], 0),                     # a run that was finished before has written nothing
    (0, 10, [TERM], 10),                                 # a preempted rank exits 0 under torchrun
    (0, 0, [TERM], 0),                                   # it was done before the signal
    (1, 13, [], 13), (12, 12, [], 12), (12, None, [], 12),
    (1, 0, [], 1),                                       # rank 0 was done, another failed
    (137, None, [], 16), (137, 16, [], 16), (-9, None, [], 16), (16, None, [], 16),
    (137, 11, [], 11),
    # Before there was anything to save
    (143, None, [TERM], 10), (138, None, [USR1], 10), (130, None, [INT], 130),
    (140, None, [USR1], 10),
    (143, 143, [TERM, TERM], 143),                       # left without a save
])
def test_exit_codes(returned: int, status: int | None, signals: list[int], code: int) -> None:
    assert run_exit_code(returned, None if status is None else {"code": status}, signals) == code


def write(run: Path, code: int) -> None:
    draft = run / "draft"
    draft.write_text(json.dumps({"code": code}))
    draft.replace(run / "status.json")


def test_the_status_of_an_earlier_run_says_nothing(tmp_path: Path) -> None:
    assert StatusFile(tmp_path / "none").written() is None
    write(tmp_path, 11)
    status = StatusFile(tmp_path)
    assert status.written() is None and not status.is_final()
    os.utime(tmp_path / "status.json", ns=(1, 1))
    assert status.written() == {"code": 11}


def test_a_final_status_stays_when_the_next_attempt_removes_it(tmp_path: Path) -> None:
    status = StatusFile(tmp_path)
    write(tmp_path, 1)
    assert status.written() == {"code": 1} and not status.is_final()
    write(tmp_path, 12)
    assert status.is_final()
    (tmp_path / "status.json").unlink()
    assert status.is_final() and status.written() == {"code": 12}


def test_a_status_that_is_cut_off_is_none(tmp_path: Path) -> None:
    status = StatusFile(tmp_path)
    (tmp_path / "status.json").write_text('{"co')
    assert status.written() is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"[" * 10_000, b'{"code": 1e400}',
                                     b'{"code": [12]}', b'{"code": "12"}',
                                     b'{"code": -1}', b'{"code": 1e3}', b'{"code": true}',
                                     b'{"reason": "none"}', b"\xff", b" " * (2 << 20)])
def test_a_status_that_rank_zero_did_not_write_is_none(tmp_path: Path, content: bytes) -> None:
    status = StatusFile(tmp_path)
    (tmp_path / "status.json").write_bytes(content)
    assert status.written() is None and not status.is_final()


@pytest.mark.parametrize("kind", ODD)
def test_a_status_or_record_that_is_no_file_holds_nobody_up(tmp_path: Path, kind: str) -> None:
    status = StatusFile(tmp_path)
    for name in ("status.json", "status.json.tmp", "metrics.jsonl"):
        make_odd(tmp_path / name, kind)
    assert status.written() is None
    write_status(tmp_path, 12, "no data")
    if kind != "folder":
        assert (json.loads((tmp_path / "status.json").read_text())
                == {"code": 12, "reason": "no data", "step": 0})


@pytest.mark.parametrize("line", ['{"step": 1e400}', "[" * 10_000, "{}", '{"step": null}', "cut off"])
def test_the_last_step_is_that_of_the_last_whole_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 6}\n{"step": 7}\n' + line)
    write_status(tmp_path, 16, "lost")
    assert json.loads((tmp_path / "status.json").read_text())["step"] == 7
