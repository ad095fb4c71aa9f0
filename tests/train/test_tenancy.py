"""The lock and the record of attempts, whatever stands in their files."""

import json
import os

import pytest

from moetrain.errors import ConfigError, CrashLoopError
from moetrain.train.tenancy import CRASHES, Tenancy


@pytest.mark.parametrize("content", ["null", "{}", "[]", "5", '{"host": 1, "pid": "x"}', "\xff", "{", ""])
def test_a_lock_that_says_nothing_names_nobody_and_is_not_broken(tmp_path, monkeypatch, content):
    monkeypatch.setattr("moetrain.train.tenancy.STALE_S", 3600.0)
    monkeypatch.setattr("moetrain.train.tenancy.BEAT_S", -3600.0)         # no waiting for a sign of life
    (tmp_path / "lock").write_bytes(content.encode("latin-1"))
    monkeypatch.setattr("moetrain.train.tenancy.time.sleep", lambda seconds: None)
    with pytest.raises(ConfigError, match="E-CONFIG-091"):
        with Tenancy(tmp_path):
            pass
    assert (tmp_path / "lock").exists()


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
