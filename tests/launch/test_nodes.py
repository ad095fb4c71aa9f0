"""launch/node.sh and launch/nodes.sh: real processes, nodes that are emulated on this machine."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.ranks import free_port
from tests.support.runs import (
    TINY,
    children,
    ended,
    is_alive,
    ranks,
    started,
    status,
    steps,
    two_nodes,
    until,
)

pytestmark = pytest.mark.ranks


def test_a_mistake_is_said_once_before_anything_starts(tmp_path: Path) -> None:
    with started("node.sh", *TINY, "train.global_batch=9", "optim.lrr=1", f"run.dir={tmp_path}/run",
                 prefix=(), NPROC=2) as node:
        code, output = ended(node)
    assert code == 2 and output.count("E-CONFIG-003") == output.count("E-CONFIG-035") == 1
    assert "2 ranks" in output and not (tmp_path / "run").exists()


def test_a_head_that_cannot_be_reached_is_named_in_time(tmp_path: Path) -> None:
    port, began = free_port(), time.monotonic()
    with started("nodes.sh", *TINY, f"run.dir={tmp_path}", NODES=2, NODE_RANK=1, HEAD="127.0.0.1", PORT=port,
                 RDZV_TIMEOUT=2) as node:
        code, output = ended(node, limit_s=30)
    assert (code == 15 and output.count("E-RENDEZVOUS-002") == 1 and f"127.0.0.1:{port}" in output
            and "Traceback" not in output)
    assert time.monotonic() - began >= 2


@pytest.mark.slow
def test_a_killed_rank_comes_back_and_the_run_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with started("node.sh", *TINY, "run.steps=40", "checkpoint.interval=5", f"run.dir={run}",
                 NPROC=2) as node:
        until(lambda: len(steps(run)) > 8)
        os.kill(ranks(run)[-1], signal.SIGKILL)
        code, output = ended(node)
    assert code == 0, output
    assert output.count("all ranks start again") == 1 and "resumed" in output
    assert status(run)["code"] == 0 and steps(run) == list(range(1, 41))


@pytest.mark.full
def test_a_lost_rank_without_restarts_is_a_lost_peer(tmp_path: Path) -> None:
    """The last rank to be restarted, rank 0: nobody else can write status.json."""
    run = tmp_path / "run"
    with started("node.sh", *TINY, "run.steps=100000", f"run.dir={run}", NPROC=1, RESTARTS=0) as node:
        until(lambda: len(steps(run)) > 1)
        os.kill(ranks(run)[0], signal.SIGKILL)
        code, output = ended(node)
    assert code == 16 and "SIGKILL" in output and "Traceback" not in output
    assert status(run)["code"] == 16


@pytest.mark.slow
def test_no_rank_outlives_its_agent(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with started("node.sh", *TINY, "run.steps=100000", f"run.dir={run}", NPROC=1) as node:
        until(lambda: len(steps(run)) > 1)
        os.kill(children(node.pid)[0], signal.SIGKILL)
        node.wait(60)
        assert not ranks(run)
        assert ended(node)[0] == 16


@pytest.mark.slow
def test_a_run_whose_supervisor_is_killed_saves_and_ends(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with started("node.sh", *TINY, "run.steps=100000", f"run.dir={run}", NPROC=1) as node:
        until(lambda: len(steps(run)) > 1)
        left = [*children(node.pid), *ranks(run)]
        node.kill()
        until(lambda: not any(map(is_alive, left)), limit_s=60)
    assert status(run)["code"] == 10 and (run / "checkpoints" / f"step-{steps(run)[-1]:08d}").is_dir()


@pytest.mark.slow
def test_what_would_only_fail_again_is_not_restarted(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with started("node.sh", *TINY, "data=tokens", f"data.path={tmp_path}/none", f"run.dir={run}",
                 NPROC=2) as node:
        code, output = ended(node)
    assert code == 12 and output.count("E-DATA-010") == 1, output
    assert status(run)["code"] == 12


@pytest.mark.slow
@pytest.mark.parametrize("number, everyone", [
    pytest.param(signal.SIGTERM, False, marks=pytest.mark.full), (signal.SIGUSR1, True),
], ids=["script", "every process"])
def test_a_signal_saves_and_ends_with_10(tmp_path: Path, number: int, everyone: bool) -> None:
    """Slurm signals every process of a step where it tracks them by cgroups: ranks get the signal twice."""
    run = tmp_path / "run"
    with started("node.sh", *TINY, "run.steps=100000", f"run.dir={run}", NPROC=2 if everyone else 1) as node:
        until(lambda: len(steps(run)) > 2)
        for process in [node.pid, *(children(node.pid) + ranks(run) if everyone else [])]:
            os.kill(process, number)
        node.wait(60)
        assert not ranks(run)                            # it does not end before them
        code, output = ended(node)
    assert code == 10, output
    last = steps(run)[-1]
    assert status(run)["code"] == 10 and (run / "checkpoints" / f"step-{last:08d}").is_dir()


# --- nodes with networks of their own


Nodes = list[tuple[tuple[str, ...], str]]


@pytest.fixture
def network() -> Iterator[Nodes]:
    """Two nodes as (prefix of a command, address).

    They are network namespaces joined by a bridge or, where those are not allowed, this machine twice.
    """
    loopback = [((), "127.0.0.1"), ((), "127.0.0.1")]
    tag = f"moe{os.getpid() % 10**6:x}"
    names = [f"{tag}a", f"{tag}b"]
    try:
        yield _joined(tag, names) if os.geteuid() == 0 and shutil.which("ip") else loopback
    finally:
        for command in (*(["netns", "del", name] for name in names), ["link", "del", tag]):
            if shutil.which("ip"):
                subprocess.run(["ip", *command], capture_output=True)


def _joined(bridge: str, names: list[str]) -> Nodes:
    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    try:
        ip("link", "add", bridge, "type", "bridge")
        ip("link", "set", bridge, "up")
        for number, name in enumerate(names, 1):
            ip("netns", "add", name)
            ip("link", "add", f"v{name}", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", f"v{name}", "master", bridge)
            ip("link", "set", f"v{name}", "up")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
    return [(("ip", "netns", "exec", name), f"10.77.0.{number}") for number, name in enumerate(names, 1)]


@pytest.mark.slow
def test_two_nodes_train(network: Nodes, tmp_path: Path) -> None:
    """In namespaces neither node knows the head's address as its own, and the only route is between them."""
    (first, head), (second, _) = network
    run = tmp_path / "run"
    with two_nodes(*TINY, "run.steps=4", f"run.dir={run}", head=head, prefixes=(first, second)) as nodes:
        for node in nodes:
            code, output = ended(node)
            assert code == 0, output
    assert status(run)["code"] == 0 and steps(run) == [1, 2, 3, 4]
    if second:                                           # an address that nobody has
        with started("nodes.sh", *TINY, f"run.dir={run}", prefix=second, NODES=2, NODE_RANK=1,
                     HEAD="10.77.0.9", PORT=29400,
                     NPROC=1, RDZV_TIMEOUT=2) as node:
            code, output = ended(node, limit_s=60)
        assert code == 15 and output.count("E-RENDEZVOUS-002") == 1 and "10.77.0.9:29400" in output
