"""Programs and packages that a test needs beside moetrain. Without them it is skipped, or fails in CI.

.ci/run installs the programs and sets MOETRAIN_TESTS_NEED_ALL=1 once they are there: a skip would then hide a
missing part.
"""

import os
import shutil
from types import ModuleType
from typing import NoReturn

import pytest

# Daemons are often not on a user's path.
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def programs(*names: str, packages: str) -> None:
    """Skip unless all programs are installed; `packages` are those of Debian and Ubuntu that bring them."""
    if absent := [name for name in names if not shutil.which(name, path=PATH)]:
        missing(f"not installed: {', '.join(absent)} (apt-get install {packages})")


def module(name: str, extra: str) -> ModuleType:
    """Import an optional Python package, or skip; `extra` is its name in pyproject.toml."""
    if os.environ.get("MOETRAIN_TESTS_NEED_ALL") == "1":
        return __import__(name)
    return pytest.importorskip(name, reason=f"not installed: {name} (pip install -e '.[{extra}]')")


def missing(reason: str) -> NoReturn:
    """Skip for a reason that an installation removes."""
    if os.environ.get("MOETRAIN_TESTS_NEED_ALL") == "1":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)
