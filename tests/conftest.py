"""Fixtures shared by all tests: ranks by world size, and the options --all (full products) and --quick."""

import os
import signal
import sys
from collections.abc import Iterable

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Hundreds of processes import this package, which has 250 files: they are compiled once.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# Background jobs of a shell, and nohup, ignore these two; the programs under test would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

import pytest

from moetrain import packages
from tests.support.ranks import Ranks


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run full products, and what is marked full")
    parser.addoption("--quick", action="store_true", help="leave out the tests marked slow, and most cases "
                                                          "of those that start several processes")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--all"):
        os.environ["COLD_START"] = "1"                   # tests/support/warm_start.py


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = items[:] if config.getoption("--all") else [item for item in items if not _marked(item, "full")]
    if config.getoption("--quick"):
        kept = [item for item in kept if not _marked(item, "slow")]
        beyond = set(_beyond(item for item in kept if _marked(item, "ranks")))
        kept = [item for item in kept if item not in beyond]
    chosen = set(kept)
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = kept


def _marked(item: pytest.Item, name: str) -> bool:
    """item.keywords would do so for a checkout in a folder of that name."""
    return item.get_closest_marker(name) is not None


def _beyond(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """All but a few cases of every parametrized test, spread over its list."""
    by_test: dict[str, list[pytest.Item]] = {}
    for item in items:
        by_test.setdefault(item.nodeid.partition("[")[0], []).append(item)
    few = {id(cases[len(cases) * i // QUICK_CASES]) for cases in by_test.values() for i in range(QUICK_CASES)}
    return [item for cases in by_test.values() for item in cases if id(item) not in few]


QUICK_CASES = 2              # with --quick, of a test that starts several processes


@pytest.fixture(autouse=True)
def no_package_is_allowed():
    """What a test allows (moetrain/packages.py) is neither allowed nor imported in the next one."""
    yield
    written = {*packages.allowed()} - {"tests"}          # into a folder of that test
    for name in [name for name in sys.modules if name.partition(".")[0] in written]:
        del sys.modules[name]
    os.environ.pop(packages.VARIABLE, None)


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


@pytest.fixture(scope="session")
def devices():
    """devices(n): n processes, each with a CUDA device in host memory; skips where there is a real one."""
    from tests.support import simulated_device

    pools: dict[int, Ranks] = {}

    def get(size: int) -> Ranks:
        if simulated_device.unavailable():
            pytest.skip(simulated_device.unavailable())
        if size not in pools or not all(process.is_alive() for process in pools[size].processes):
            pools[size] = Ranks(size, simulated=True)
        return pools[size]

    yield get
    for pool in pools.values():
        pool.close()
