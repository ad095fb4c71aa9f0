"""Local ranks: their environment, their logs, and how one failure ends all of them. Real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moetrain.__main__ import main
from moetrain.errors import DiskError
from moetrain.launch import local
from moetrain.launch.local import start_ranks
from moetrain.launch.rank import has_own_stderr, is_worker, under_torchrun
from moetrain.launch.status import record_ending

ROOT = Path(__file__).parents[2]
DONE = "echo $RANK >&$MOETRAIN_DONE"                     # what a rank says at its end (become_rank)


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """start(script): start_ranks with a shell script in place of `python -m moetrain`."""
    monkeypatch.setattr(local, "GRACE_S", 0.5)
    monkeypatch.setattr(local, "TERM_S", 0.5)
    for name in ("RANK", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)

    def start(script: str, nproc: int = 2) -> int:
        fake = tmp_path / "python"
        fake.write_text(f"#!/bin/bash\n{script}\n")
        fake.chmod(0o755)
        monkeypatch.setattr(local.sys, "executable", str(fake))
        return start_ranks(["train"], nproc, tmp_path / "run")

    return start


def status(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "run" / "status.json").read_text())


def test_ranks_get_their_environment(ranks, tmp_path: Path) -> None:
    names = ("RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT OMP_NUM_THREADS "
             "TORCH_DISABLE_SHARE_RDZV_TCP_STORE")
    assert ranks(f'for n in {names}; do echo "$n=${{!n}}" >> {tmp_path}/env-$RANK; done; echo "$@"; {DONE}',
                 nproc=3) == 0
    seen = [dict(line.split("=") for line in (tmp_path / f"env-{rank}").read_text().splitlines())
            for rank in range(3)]
    assert [env["RANK"] for env in seen] == [env["LOCAL_RANK"] for env in seen] == ["0", "1", "2"]
    assert {(env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"], env["MASTER_ADDR"],
             env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"])
            for env in seen} == {("3", "3", "127.0.0.1", "1")}
    assert len({env["MASTER_PORT"] for env in seen}) == 1 and int(seen[0]["OMP_NUM_THREADS"]) >= 1
    assert (tmp_path / "run" / "log" / "rank-2.log").read_text() == "-m moetrain train\n"
    assert not (tmp_path / "run" / "log" / "rank-0.log").exists()


def test_the_real_program_runs_on_ranks(tmp_path: Path, capfd: pytest.CaptureFixture,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert start_ranks(["version"], 2, tmp_path) == 0
    assert capfd.readouterr().out.count("moetrain 0.") == 1
    assert "moetrain 0." in (tmp_path / "log" / "rank-1.log").read_text()
    assert start_ranks(["train", "optim.lrr=1", "parallel=ddp", "train.micro_batch=8"], 2, tmp_path) == 2
    assert capfd.readouterr().err.count("E-CONFIG") == 1
    assert "E-CONFIG-003" in (tmp_path / "log" / "rank-1.log").read_text()


def test_the_first_failure_gives_the_code_and_stops_the_others(
        ranks, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    started = time.monotonic()
    assert ranks("[ $RANK = 1 ] && exit 12; exec sleep 60") == 12
    assert time.monotonic() - started < 5
    error = capfd.readouterr().err
    assert error.count("moetrain: rank 1 ended with code 12") == 1 and "rank-1.log" in error
    assert status(tmp_path)["code"] == 12


def test_others_may_end_on_their_own(ranks) -> None:
    assert ranks("[ $RANK = 0 ] && exit 16; sleep 0.2; exit 3") == 16


def test_a_stubborn_rank_is_killed(ranks) -> None:
    started = time.monotonic()
    assert ranks("trap '' TERM; [ $RANK = 0 ] && exit 11; while true; do sleep 0.1; done") == 11
    assert time.monotonic() - started < 6


@pytest.mark.parametrize("script, blamed", [
    (f"[ $RANK = 1 ] && exit 0; sleep 0.3; {DONE}", "rank 1 left with 0 before its work was done"),
    # The other waited for it
    ("[ $RANK = 1 ] && exit 0; sleep 0.3; exit 16", "rank 1 left with 0 before its work was done"),
    ("exit 0", "rank 0 left with 0 before its work was done"),
    ("[ $RANK = 0 ] && kill -STOP $$; exit 16", "rank 0 is stopped (process "),
    ("[ $RANK = 1 ] && kill -STOP $$; exit 16", "rank 1 is stopped (process "),
    ("trap '' TERM; [ $RANK = 1 ] && exit 16; while true; do sleep 0.1; done",
     "rank 0 does not answer (process "),
])
def test_the_rank_to_blame_is_named_not_the_one_that_noticed(
        ranks, tmp_path: Path, capfd: pytest.CaptureFixture, script: str, blamed: str) -> None:
    assert ranks(script) == 16
    assert blamed in capfd.readouterr().err
    assert status(tmp_path)["code"] == 16 and status(tmp_path)["reason"].startswith(blamed)


def test_ranks_die_with_their_launcher_even_stopped_ones(tmp_path: Path) -> None:
    """With what they do on SIGTERM: a rank that trains saves."""
    rank = (f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); "
            "from moetrain.launch.rank import become_rank, rank; become_rank(); "
            f"open({str(tmp_path)!r} + '/up-%d' % rank(), 'w').close(); time.sleep(60)")
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/bash\nexec {sys.executable} -c "{rank}"\n')
    fake.chmod(0o755)
    program = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); "
               "from pathlib import Path; from moetrain.launch.local import start_ranks; "
               f"sys.executable = {str(fake)!r}; start_ranks(['train'], 2, Path({str(tmp_path)!r}))")
    launcher = subprocess.Popen([sys.executable, "-c", program],
                                env={name: v for name, v in os.environ.items() if name != "RANK"})
    until(lambda: all((tmp_path / f"up-{rank}").exists() for rank in (0, 1)))
    workers = [int(pid)
               for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]
    os.kill(workers[0], signal.SIGSTOP)
    launcher.kill()
    launcher.wait()
    until(lambda: not any(is_alive(worker) for worker in workers))


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize("variables, what", [
    ({"RANK": "x"}, "RANK=x"), ({"RANK": ""}, "RANK="), ({"RANK": "-1"}, "RANK=-1"),
    ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE=two"),
    ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0.5"}, "LOCAL_RANK=0.5"),
    ({"RANK": "0", "MASTER_PORT": "http"}, "MASTER_PORT=http"),
    ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 with WORLD_SIZE=2")])
def test_a_rank_that_is_no_number_is_a_mistake_of_the_environment(
        monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys, variables, what) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "experiment=debug", "parallel=ddp"]) == 2
    said = capsys.readouterr().err
    assert f"E-CONFIG-140  {what} in the environment" in said and "unset RANK" in said
    assert not list(tmp_path.iterdir())


def test_a_killed_rank_is_a_lost_peer(ranks, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    assert ranks("[ $RANK = 1 ] && kill -KILL $$; exec sleep 60") == 16
    assert "rank 1 was ended by SIGKILL" in capfd.readouterr().err
    assert status(tmp_path) == {
        "code": 16, "reason": f"rank 1 was ended by SIGKILL; see {tmp_path}/run/log/rank-1.log", "step": 0}


def test_ranks_that_save_are_not_hurried(ranks, tmp_path: Path) -> None:
    assert ranks(f"[ $RANK = 1 ] && exit 10; sleep 1.2; touch {tmp_path}/saved; exit 10") == 10
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize("number, script, code", [
    (signal.SIGTERM, "trap 'exit 10' TERM", 10), (signal.SIGINT, "trap 'exit 130' INT", 130),
    (signal.SIGTERM, "", 143), (signal.SIGHUP, "trap 'exit 10' HUP", 10), (signal.SIGHUP, "", 129),
    # A rank is lost on the way: no restart
    (signal.SIGINT, "[ $RANK = 1 ] && trap 'kill -KILL $$' INT || trap '' INT", 130)])
def test_signals_are_passed_on(tmp_path: Path, number: int, script: str, code: int) -> None:
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/bash\n{script}\ntouch {tmp_path}/up-$RANK\n"
                    "while true; do sleep 0.05 & wait $!; done\n")
    fake.chmod(0o755)
    # A shell starts what runs in the background with interrupts ignored, and bash cannot trap what it was
    # told to ignore.
    program = ("import signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
               f"sys.path.insert(0, {str(ROOT)!r}); "
               "from pathlib import Path; from moetrain.launch import local; local.GRACE_S = 0.5; "
               f"sys.executable = {str(fake)!r}; "
               f"sys.exit(local.start_ranks(['train'], 2, Path({str(tmp_path)!r})))")
    clean = {name: value for name, value in os.environ.items() if name != "RANK"}
    launcher = subprocess.Popen([sys.executable, "-c", program], env=clean)
    try:
        until(lambda: all((tmp_path / f"up-{rank}").exists() for rank in (0, 1)))
        launcher.send_signal(number)
        assert launcher.wait(40) == code
    finally:
        launcher.kill()


def test_a_log_that_cannot_be_written_is_a_disk_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file, not a directory")
    with pytest.raises(DiskError) as caught:
        start_ranks(["version"], 2, tmp_path / "run")
    assert caught.value.code == 14 and "rank-1.log" in str(caught.value)


def test_a_worker_does_not_start_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert not is_worker()
    monkeypatch.setenv("RANK", "1")
    assert is_worker() and under_torchrun() and not has_own_stderr()
    monkeypatch.setenv("MOETRAIN_LAUNCHED", "1")
    assert not under_torchrun() and has_own_stderr()


def test_a_rank_of_torchrun_leaves_its_error_in_a_log(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(DiskError), record_ending(tmp_path):
        raise DiskError(9, "full", where="here", why="no space", next="make some")
    assert ("E-DISK-009" in (tmp_path / "log" / "rank-3.log").read_text()
            and not (tmp_path / "status.json").exists())
