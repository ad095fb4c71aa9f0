"""Fixtures shared by all tests: ranks by world size, and the options --all (full products) and --quick."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from tests.ranks import Ranks


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the full product of the parity matrix")
    parser.addoption("--quick", action="store_true", help="leave out the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--quick"):
        kept = [item for item in items if "slow" not in item.keywords]
        config.hook.pytest_deselected(items=[item for item in items if "slow" in item.keywords])
        items[:] = kept


@pytest.fixture(scope="session")
def ranks():
    """ranks(n): the n processes of this session; started once per world size."""
    pools: dict[int, Ranks] = {}

    def get(size: int) -> Ranks:
        if size not in pools or not all(process.is_alive() for process in pools[size].processes):
            pools[size] = Ranks(size)
        return pools[size]

    yield get
    for pool in pools.values():
        pool.close()
