"""ruff finds nothing: imports are sorted, every name is there, and nothing is imported that is not used (pyproject.toml)."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def check(*words: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", *map(str, words)], cwd=ROOT,
                          capture_output=True, text=True)


def test_ruff_finds_nothing() -> None:
    found = check("moetrain", "tests", "tools")
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("source", ["import os\n", "print(missing)\n", "import sys\nimport os\n\nprint(os, sys)\n"])
def test_it_looks(tmp_path: Path, source: str) -> None:
    (tmp_path / "file.py").write_text(source)
    assert check("--config", ROOT / "pyproject.toml", tmp_path / "file.py").returncode == 1
