"""Lock of a run's directory, with real processes, in their own namespaces where the machine allows it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moetrain.errors import ConfigError, DiskError
from moetrain.runs import lock
from moetrain.runs.lock import Holder, RunLock

ROOT = Path(__file__).parents[2]
# Takes the lock and keeps it until it is killed or its input ends; what it says is "held" or the error.
KEEPER = """
import sys
from pathlib import Path
from moetrain.errors import ConfigError
from moetrain.runs.lock import RunLock
try:
    with RunLock(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.read()
except ConfigError as error:
    print(error, flush=True)
"""


def keeper(directory: Path, *prefix: str) -> subprocess.Popen:
    return subprocess.Popen([*prefix, sys.executable, "-c", KEEPER, str(directory)], text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            env={**os.environ, "PYTHONPATH": str(ROOT)})


def record(directory: Path, **changes: object) -> None:
    """Write the lock of a job on another machine, just renewed."""
    (directory / "lock").write_text(
        json.dumps(Holder("another boot", "node-b", 7, "moetrain train", "today", "1")._asdict() | changes))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "STALE_S", 1.0)
    monkeypatch.setattr(lock, "RENEW_S", 0.1)
    monkeypatch.setattr(lock, "RETRY_S", 0.1)


def test_a_second_process_is_refused_and_the_first_may_be_killed_or_stopped(tmp_path: Path,
                                                                            quick: None) -> None:
    first = keeper(tmp_path)
    assert first.stdout.readline() == "held\n"
    os.kill(first.pid, signal.SIGSTOP)
    until(lambda: Path(f"/proc/{first.pid}/stat").read_text().rpartition(") ")[2][0] == "T")
    with pytest.raises(ConfigError) as refused, RunLock(tmp_path):
        pytest.fail("two jobs")
    assert refused.value.id == "E-CONFIG-091" and RunLock(tmp_path).holder().pid == first.pid
    assert f"process {first.pid} on " in refused.value.why
    assert "-c" in refused.value.why
    assert "is stopped" in refused.value.why
    assert f"kill -KILL {first.pid}" in refused.value.next
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert RunLock(tmp_path).holder() is None
    with RunLock(tmp_path) as ours:                      # at once, though the file is still there
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
        # `holder` names another process only.
        assert ours.holder() is None and RunLock(tmp_path).holder() is None
    assert not list(tmp_path.iterdir())


def test_containers_on_one_machine_are_told_apart(tmp_path: Path) -> None:
    """Containers may share process ids and host names; the kernel's locks still tell them apart."""
    prefix = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--uts", "--mount-proc"]
    if not shutil.which("unshare") or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("this machine allows no name spaces")
    inside, other = keeper(tmp_path, *prefix), None
    try:
        assert inside.stdout.readline() == "held\n"
        other = keeper(tmp_path, *prefix)
        assert other.stdout.readline().startswith("E-CONFIG-091")
        assert keeper(tmp_path).communicate()[0].startswith("E-CONFIG-091")
    finally:
        for process in filter(None, (inside, other)):
            process.communicate()
    assert keeper(tmp_path).communicate()[0] == "held\n"


ROUNDS = """
import os, sys
from pathlib import Path
from moetrain.errors import ConfigError
from moetrain.runs import lock
lock.RETRY_S = 0.0                                    # who is not the first is refused
directory, rounds, processes = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
stale = lock.Holder(lock._boot_id(), "here", 1, "gone", "long ago", "0")._asdict()

def contend(go, done):
    while os.read(go, 1) == b"g":
        try:
            with lock.RunLock(directory):
                os.write(done, b"1")
                os.read(go, 1)                           # keep it until all have tried
        except ConfigError:
            os.write(done, b"0")
            os.read(go, 1)
        os.write(done, b".")

pipes = []
for _ in range(processes):
    (go_in, go), (done, done_out) = os.pipe(), os.pipe()
    if os.fork() == 0:
        contend(go_in, done_out)
        os._exit(0)
    pipes.append((go, done))
wrong = 0
for number in range(rounds):
    if number % 2 == 0:                                  # a stale one, or none at all
        (directory / "lock").write_text(__import__("json").dumps(stale))
    for go, _ in pipes: os.write(go, b"g")
    wrong += sum(os.read(done, 1) == b"1" for _, done in pipes) != 1
    for go, _ in pipes: os.write(go, b"e")
    for _, done in pipes: os.read(done, 1)
print(wrong)
for go, _ in pipes: os.write(go, b"x")
"""


@pytest.mark.parametrize("processes", [2, 4])
def test_of_several_that_take_over_one_wins(tmp_path: Path, processes: int) -> None:
    done = subprocess.run([sys.executable, "-c", ROUNDS, str(tmp_path), "100", str(processes)],
                          capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.stdout == "0\n", done.stderr


@pytest.mark.parametrize("content", [
    "null", "{}", "[]", "5", '{"host": 1, "pid": "x"}', "\xff", "{", "[" * 3000, "x" * 9000,
    '{"host": "a", "pid": 1, "born": "2", "since": "3"}'])
def test_a_lock_that_does_not_say_whose_it_is_is_watched_and_then_taken_over(tmp_path: Path, quick: None,
                                                                             content: str) -> None:
    (tmp_path / "lock").write_bytes(content.encode("latin-1"))
    # It may be another machine's, so it counts.
    assert content == "null" or RunLock(tmp_path).holder().host == "?"
    with RunLock(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("age_s", [0, -86400], ids=["fresh", "dated ahead"])
def test_another_machine_is_believed_for_as_long_as_it_renews_its_record(tmp_path: Path, quick: None,
                                                                         age_s: int) -> None:
    record(tmp_path)
    date = time.time() - age_s
    os.utime(tmp_path / "lock", (date, date))
    with RunLock(tmp_path):                              # nothing came for STALE_S
        pass
    record(tmp_path)
    renewing = subprocess.Popen(
        ["bash", "-c", 'while sleep 0.05; do [ -e "$0" ] && touch "$0"; done', str(tmp_path / "lock")])
    try:
        with pytest.raises(ConfigError, match="E-CONFIG-091") as refused, RunLock(tmp_path):
            pytest.fail("two jobs")
        assert "process 7 on node-b (moetrain train)" in refused.value.why
        assert "kill 7 on node-b" in refused.value.next
        assert RunLock(tmp_path).holder().host == "node-b"
    finally:
        renewing.kill()
        renewing.wait()


def test_an_old_record_of_another_machine_is_not_waited_for(tmp_path: Path) -> None:
    record(tmp_path)
    os.utime(tmp_path / "lock", (1e9, 1e9))
    began = time.monotonic()
    with RunLock(tmp_path):
        assert time.monotonic() - began < lock.STALE_S / 2


def test_without_locks_of_the_file_system_the_record_decides(tmp_path: Path, quick: None,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    def none(descriptor: int, *, shared: bool = False) -> bool:
        raise OSError("no locks available")

    monkeypatch.setattr(lock, "try_lock", none)
    with RunLock(tmp_path), pytest.raises(ConfigError, match="E-CONFIG-091"), RunLock(tmp_path):
        pytest.fail("two jobs")
    record(tmp_path, machine=lock._boot_id())
    with RunLock(tmp_path):
        pass


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "lock")
    with pytest.raises(DiskError, match="a named pipe"), RunLock(tmp_path):
        pass


def until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
