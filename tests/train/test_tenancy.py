"""The lock and the record of attempts, whatever stands in their files."""

import json
import os

import pytest

from moetrain.errors import CrashLoopError
from moetrain.train.tenancy import CRASHES, Tenancy


@pytest.mark.parametrize("content", ["null", "{}", "[]", "5", '{"host": 1, "pid": "x"}', "\xff", "{", ""])
def test_a_lock_that_does_not_say_whose_it_is_is_waited_for_and_then_taken_over(tmp_path, monkeypatch, content):
    monkeypatch.setattr("moetrain.train.tenancy.STALE_S", 0.3)
    monkeypatch.setattr("moetrain.train.tenancy.BEAT_S", 0.1)
    (tmp_path / "lock").write_bytes(content.encode("latin-1"))
    assert Tenancy(tmp_path).holder()["host"] == "?"     # as long as it may be somebody's
    with Tenancy(tmp_path) as ours:
        assert json.loads(ours.lock.read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("line", [b"\xff\xfe", b'{"end": "x"}', b"null", b'{"start": 0', b"[]"])
def test_a_damaged_line_of_attempts_is_passed_over(tmp_path, line):
    tenancy = Tenancy(tmp_path)
    for _ in range(CRASHES - 1):
        tenancy.begin(4)
        with tenancy.attempts.open("ab") as file:
            file.write(line + b"\n")
    tenancy.begin(4)
    with pytest.raises(CrashLoopError):
        tenancy.begin(4)
    tenancy.begin(5)                                     # it got further


def test_a_lock_of_a_process_that_is_gone_is_taken_over(tmp_path):
    with Tenancy(tmp_path) as first:
        held = json.loads(first.lock.read_text())
    (tmp_path / "lock").write_text(json.dumps({**held, "pid": os.getpid(), "born": "never"}))
    with Tenancy(tmp_path):
        pass
    assert not (tmp_path / "lock").exists()
