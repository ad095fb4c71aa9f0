"""A missing package is reported before a process or a file exists."""

import subprocess
import sys

import pytest

from tests.support.command_line import DEBUG, environment

HIDE = """import sys, importlib.util as util
found = util.find_spec
util.find_spec = lambda name, *rest: None if name == sys.argv[1] else found(name, *rest)
from moetrain.__main__ import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("package, extra, overrides", [
    ("deepspeed", "deepspeed", ["engine=deepspeed", "parallel=ep", "run.nproc=2"]),
    ("ninja", "deepspeed", ["engine=deepspeed", "parallel=ep", "run.nproc=2"]),
    ("megatron.core", "megatron", ["data=megatron", "data.path=nowhere"]),
])
def test_a_missing_package_says_what_to_install(tmp_path, package, extra, overrides):
    done = subprocess.run([sys.executable, "-c", HIDE, package, "train", *DEBUG, *overrides], cwd=tmp_path,
                          env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "E-CONFIG-069" in done.stderr, done.stderr
    assert package in done.stderr and f"[{extra}]" in done.stderr
    assert not (tmp_path / "runs").exists()
