"""The record of attempts is read from any file. The lock has its own tests (tests/runs/test_lock.py)."""

import pytest

from moetrain.errors import CrashLoopError
from moetrain.runs.attempts import CRASHES, RunAttempts


@pytest.mark.parametrize("line", [b"\xff\xfe", b'{"end": "x"}', b"null", b'{"start": 0', b"[]"])
def test_a_damaged_line_of_attempts_is_passed_over(tmp_path, line):
    run_attempts = RunAttempts(tmp_path)
    for _ in range(CRASHES - 1):
        run_attempts.begin(4)
        with run_attempts.attempts.open("ab") as file:
            file.write(line + b"\n")
    run_attempts.begin(4)
    with pytest.raises(CrashLoopError):
        run_attempts.begin(4)
    run_attempts.begin(5)                                     # it got further
