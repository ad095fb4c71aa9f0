"""What a run records as its exit code, whatever ends it."""

import json
import sys

import pytest

from moetrain.errors import ConfigError, exit_code
from moetrain.launch.status import record_ending


@pytest.mark.parametrize("ending, code", [
    (lambda: sys.exit(), 0), (lambda: sys.exit(0), 0), (lambda: sys.exit(7), 7), (lambda: sys.exit("no"), 1)])
def test_a_users_exit_is_recorded_as_python_ends(tmp_path, ending, code):
    with pytest.raises(SystemExit), record_ending(tmp_path):
        ending()
    assert json.loads((tmp_path / "status.json").read_text())["code"] == code


def test_every_exception_has_an_exit_code():
    assert exit_code(ConfigError(1, "a", where="b", why="c", next="d")) == 2
    assert exit_code(KeyboardInterrupt()) == 130
    assert exit_code(ValueError()) == 1
