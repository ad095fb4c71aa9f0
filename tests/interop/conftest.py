"""What DeepSpeed compiles at its first use (half a minute) is kept in the environment, for all tests and the next session."""

import os
import sys
from pathlib import Path

import pytest

from tests.ranks import pools

os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))


@pytest.fixture(scope="session")
def ranks():
    """Ranks of one process group for all tests: DeepSpeed keeps what it makes of it."""
    with pools(lasting=True) as get:
        yield get
