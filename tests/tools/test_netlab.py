"""tools/netlab/lab.py: ranks in networks of their own, with limited links."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.runs import ROOT, children, until
from tools.netlab import lab as netlab, measure as netlab_measure, processes as netlab_processes

TOOL = ("-m", "tools.netlab")
TWO_BY_TWO = {"nodes": 2, "per_node": 2}
SLOW_LINKS = {"inside": "180mbit", "between": "20mbit"}

# Every rank exchanges 256 KiB with the other rank of its node, then with its neighbour on the other node.
EXCHANGE = """
import json, sys, time
import torch
import torch.distributed as dist
from moetrain.comm.mesh import build_mesh, connect, disconnect, mesh_sizes

connect(torch.device("cpu"), 60)
rank, world, size = dist.get_rank(), dist.get_world_size(), 256 * 1024
mesh = build_mesh(mesh_sizes("ep", world, None), torch.device("cpu"))
found = {"node": mesh["node"].ranks}
for link, peer in (("inside", rank ^ 1), ("between", rank ^ 2)):
    splits = [size if other == peer else 0 for other in range(world)]
    sent, received = torch.full((size,), rank, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)
    times = []
    for _ in range(3):
        dist.barrier()
        began = time.perf_counter()
        dist.all_to_all_single(received, sent, splits, splits)
        times.append(time.perf_counter() - began)
    found[link] = {"seconds": min(times), "right": bool((received == peer).all())}
with open(f"{sys.argv[1]}/{rank}.json", "w") as file:
    json.dump(found, file)
disconnect()
"""

# Rank 1 fails with an exchange under way, in which rank 0 takes no part: a clean exit would wait for it.
FAILING = """
import time
import torch
import torch.distributed as dist
from tools.netlab.rank import connected

with connected(100):
    dist.barrier()
    if dist.get_rank() == 0:
        time.sleep(1000)
    torch.ops._c10d_functional.all_to_all_single(torch.ones(2), [1, 1], [1, 1], dist.group.WORLD.group_name)
    raise ValueError("an error of its own")
"""


@pytest.fixture(scope="module", autouse=True)
def possible() -> None:
    try:
        with netlab.Lab(nodes=1, per_node=1, inside="1gbit"):
            pass
    except netlab.LabError as error:
        pytest.skip(str(error))


@pytest.fixture
def start() -> Callable[..., subprocess.Popen]:
    """start(command): the tool as a process of its own, after its rank 0 has said a word."""
    started = []

    def start(*command: str) -> subprocess.Popen:
        words = ["--nodes", "2", "--per-node", "1", "--between", "1gbit", "--", *command]
        process = subprocess.Popen([sys.executable, *TOOL, *words],
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        started.append(process)
        while "ready" not in (line := process.stdout.readline()):
            assert line, "it ended before rank 0 was ready"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate(timeout=30)


def networks(processes: list[int]) -> set[str]:
    """The network namespaces in which these processes are, this one's left out."""
    own = os.readlink("/proc/self/ns/net")
    return {os.readlink(f"/proc/{process}/ns/net") for process in processes} - {own}


def in_use(those: set[str]) -> bool:
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(entry / "ns" / "net") in those:
                return True
        except OSError:
            continue
    return False


@pytest.mark.slow
@pytest.mark.ranks
def test_an_exchange_is_right_and_takes_the_link_of_its_class(tmp_path: Path) -> None:
    script = tmp_path / "exchange.py"
    script.write_text(EXCHANGE)
    with netlab.Lab(**TWO_BY_TWO, **SLOW_LINKS) as lab:
        assert lab.run([str(script), str(tmp_path)], {"PYTHONPATH": str(ROOT)}) == 0
        sent = [lab.sent(rank) for rank in range(4)]
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    assert [one["node"] for one in found] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert all(one[link]["right"] for one in found for link in netlab.LINKS)
    payload = 3 * 256 * 1024
    assert all(payload < counts[link] < 1.5 * payload for counts in sent for link in netlab.LINKS), sent
    inside, between = (max(one[link]["seconds"] for one in found) for link in netlab.LINKS)
    assert between > 3 * inside, (inside, between)             # 9 by the rates


@pytest.mark.parametrize("end, code", [("exit 7", 7), ("kill -9 $$", 137)], ids=["fails", "is killed"])
def test_the_first_failure_is_the_exit_code_and_ends_the_rest(
        end: str, code: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(netlab_processes, "GRACE_S", 0.2)
    before = children(os.getpid())
    script = ("echo here $LOCAL_RANK/$LOCAL_WORLD_SIZE; "
              f"if [ $RANK = 2 ]; then sleep 0.3; {end}; fi; exec sleep 1000")
    assert netlab.run(["sh", "-c", script], **TWO_BY_TWO, **SLOW_LINKS) == code
    assert children(os.getpid()) == before
    output, errors = capfd.readouterr()
    assert output == "here 0/2\n" and "[rank 3] here 1/2\n" in errors and "netlab: rank 2 " in errors
    assert "netlab: rank 3 (sleeping) still ran 0.2 s after rank 2 failed, and was stopped" in errors


# Rank 0 sends the tool a signal that both ranks ignore.
TO_THE_TOOL = """
trap '' TERM
[ $RANK = 1 ] && : >$HERE/ready
until [ -e $HERE/ready ]; do sleep 0.05; done
[ $RANK = 0 ] && kill -TERM $PPID
"""


@pytest.mark.parametrize("limit, script, limit_s, code, said", [
    ("GRACE_S", "[ $RANK = 0 ] && sleep 1 && exit 3; kill -STOP $$", 60, 3,
     "netlab: rank 1 (stopped) still ran 0.3 s after rank 0 failed"),
    ("LATE_S", "[ $RANK = 0 ] && exit 0; exec sleep 1000", 60, 124,
     "netlab: rank 1 (sleeping) still ran 0.3 s after others had ended"),
    ("SAVE_S", TO_THE_TOOL + "exec sleep 1000", 60, 143,
     "netlab: rank 1 (sleeping) still ran 0.3 s after SIGTERM"),
    ("TERM_S", "trap '' TERM; exec sleep 1000", 0.5, 124,
     "netlab: rank 1 (sleeping) still ran 0.5 s after the start"),
], ids=["one is stopped", "one does not end", "a signal is ignored", "all are too slow"])
def test_every_wait_ends_and_says_who_was_missing(
        limit: str, script: str, limit_s: float, code: int, said: str, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(netlab_processes, "TERM_S", 0.3)
    monkeypatch.setattr(netlab_processes, limit, 0.3)
    before, began = children(os.getpid()), time.monotonic()
    ended = netlab.run(["sh", "-c", script], nodes=2, per_node=1, env={"HERE": str(tmp_path)},
                       limit_s=limit_s)
    assert ended == code
    assert time.monotonic() - began < 30
    assert children(os.getpid()) == before
    assert said in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.ranks
def test_a_rank_that_fails_goes_at_once(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(netlab_processes, "GRACE_S", 0.2)
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tools'}"}
    assert netlab.run([str(script)], nodes=2, per_node=1, env=path, limit_s=60) == 1
    errors = capfd.readouterr().err
    assert "ValueError: an error of its own" in errors and "netlab: rank 1 ended with code 1" in errors


def test_a_program_that_makes_the_networks_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    before = children(os.getpid())
    monkeypatch.setattr(netlab, "SETUP_S", 2.0)
    monkeypatch.setattr(netlab, "HOLDER", "exec sleep 1000")
    with pytest.raises(netlab.LabError, match="no answer within 2 s"):
        netlab.run(["true"], nodes=1, per_node=1)
    assert children(os.getpid()) == before


def test_what_a_rank_started_ends_with_its_network() -> None:
    with netlab.Lab(nodes=1, per_node=1) as lab:
        holders = networks(children(os.getpid()))
        assert lab.run(["sh", "-c", "setsid sleep 1000 & sleep 0.2"]) == 0
        assert in_use(holders)
    assert holders and not in_use(holders)


def test_a_rank_that_comes_up_after_the_tool_is_gone_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    with netlab.Lab(nodes=1, per_node=1) as lab:
        with monkeypatch.context() as patched:
            # Its parent is another than the one that started it.
            patched.setattr(netlab.os, "getpid", lambda: 1)
            late = lab.start(0, ["echo", "started"], stdout=subprocess.PIPE, text=True)
        assert (late.communicate(timeout=30)[0], late.returncode) == ("", 1)


def test_nothing_is_left_when_the_tool_itself_is_killed(start: Callable[..., subprocess.Popen]) -> None:
    process = start("sh", "-c", "sleep 1000 & echo ready; wait")
    those = networks(children(process.pid))
    assert len(those) == 3                                     # of two ranks and the bridges
    assert in_use(those)
    process.kill()
    until(lambda: not in_use(those), limit_s=20)


def test_a_signal_reaches_the_ranks_and_they_end_in_their_own_way(
        start: Callable[..., subprocess.Popen]) -> None:
    process = start("sh", "-c", "trap 'exit 10' TERM; echo ready; while :; do sleep 0.05; done")
    those = networks(children(process.pid))
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 10
    assert not in_use(those)


def test_two_labs_at_once_do_not_disturb_each_other() -> None:
    with netlab.Lab(**TWO_BY_TWO, **SLOW_LINKS) as first, netlab.Lab(**TWO_BY_TWO) as second:
        assert first.run(["true"]) == second.run(["true"]) == 0


def test_a_kernel_without_tbf_gets_htb(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = ("qdisc add dev {device} root nosuchthing",)
    monkeypatch.setattr(netlab, "SHAPERS", {"none": absent, "htb": netlab.SHAPERS["htb"]})
    with netlab.Lab(nodes=1, per_node=2, inside="180mbit", between="20mbit") as lab:
        showing = lab.start(1, ["tc", "class", "show", "dev", "between"], stdout=subprocess.PIPE, text=True)
        shown, _ = showing.communicate()
        carried = netlab_measure.transfer(lab, 0, 1, 0.7)()
    assert "htb" in shown and "rate 20Mbit" in shown
    assert carried < 190e6


@pytest.mark.slow
def test_measure_shows_both_links_and_the_cost_of_moving_bytes() -> None:
    with netlab.Lab(**TWO_BY_TWO, **SLOW_LINKS) as lab:
        table = "\n".join(netlab_measure.measure(lab, 0.3))
    assert "inside   rank 0 -> 1" in table and "asked 180" in table
    assert "between  rank 0 -> 2" in table and "asked 20" in table
    assert table.count("both ways") == 2


def test_a_stream_that_does_not_come_is_not_waited_for(
        monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(netlab_measure, "START_S", 1.5)
    with netlab.Lab(nodes=1, per_node=2) as lab:
        monkeypatch.setattr(lab, "address", lambda rank: "10.99.0.1")                  # no route
        rate = netlab_measure.transfer(lab, 0, 1, 0.1)
        with pytest.raises(netlab.LabError, match="rank 0, which sends to rank 1, failed"):
            rate()
        receiver = lab.start(1, [netlab_measure.__file__, "receive", "30000", "0.5"])
        assert receiver.wait(30) == 1
    errors = capfd.readouterr().err
    assert "unreachable" in errors and "TimeoutError" in errors


# --- what is said when it cannot be


def refused(*words: str, prefix: tuple[str, ...] = (), **environment: str) -> str:
    done = subprocess.run([*prefix, sys.executable, *TOOL, *words], cwd=ROOT,
                          env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and not done.stdout
    return done.stderr


def test_a_missing_program_is_named_with_its_package(tmp_path: Path) -> None:
    for name in netlab.PROGRAMS:
        if name != "tc":
            (tmp_path / name).symlink_to(shutil.which(name))
    message = refused("--", "true", PATH=str(tmp_path))
    assert "need tc, not found" in message and "install iproute2" in message


def test_a_user_who_may_not_make_networks_hears_what_would_help() -> None:
    """A user namespace of its own, in which no further network is allowed."""
    prefix = ("unshare", "--user", "--map-root-user", "sh", "-c",
              'echo 0 >/proc/sys/user/max_net_namespaces && exec "$@"', "sh")
    if subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces here")
    message = refused("--", "true", prefix=prefix)
    assert "may not make any" in message and "run as root" in message


@pytest.mark.parametrize("words, part", [
    (("--inside", "9mb", "--", "true"), "'9mb' is not the rate"), (("--nodes", "0", "--", "true"), "0 nodes"),
    (("--inside", "1gbit"), "nothing to run"),
])
def test_a_wrong_call_is_refused(words: tuple[str, ...], part: str) -> None:
    assert part in refused(*words)
