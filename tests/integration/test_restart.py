"""Runs that are told to stop, lose a rank, crash repeatedly or meet another job.

The processes and signals are real. The losses of every step in metrics.jsonl are compared, to the last bit,
with those of a run that nobody disturbed.
"""

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.jobs import ROOT, SMALL, TWO, Job


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(10 if metafunc.config.getoption("--all") else 1))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run that is not disturbed, even by output that goes nowhere.

    The reader of its output has left, and standard error is closed.
    """
    job = Job(tmp_path_factory.mktemp("undisturbed"), *TWO, shell="2>&- | head -1")
    assert job.wait() == 0, job.text()
    assert len(job.text().splitlines()) == 1
    assert job.steps() == list(range(1, 41))
    return job


@pytest.mark.slow
@pytest.mark.parametrize("number, to", [(signal.SIGINT, "launcher"),
                                        pytest.param(signal.SIGHUP, "one rank", marks=pytest.mark.full)])
def test_told_to_stop_all_ranks_save_after_the_same_step_and_the_same_command_goes_on(
        undisturbed, tmp_path, number, to):
    job = Job(tmp_path, *TWO).wait_for(12)
    os.kill(job.process.pid if to == "launcher" else job.workers()[1], number)
    assert job.wait() == 10, job.text()
    stopped = job.steps()[-1]
    assert job.status()["code"] == 10 and job.status()["step"] == stopped < 40
    assert (job.run_dir / "checkpoints" / f"step-{stopped:08d}" / "manifest.json").exists()
    assert job.text().count("E-PREEMPTED-001") == 1 and "Traceback" not in job.text()
    again = Job(tmp_path, *TWO)
    assert again.wait() == 0, again.text()
    assert again.losses() == undisturbed.losses()


@pytest.mark.slow
def test_a_second_signal_leaves_at_once_without_a_save(tmp_path):
    """Also where the rank waits in a collective, for one that has stopped."""
    job = Job(tmp_path, *TWO, "checkpoint.interval=0", steps=20000).wait_for(5)
    first, other = job.workers()
    os.kill(other, signal.SIGSTOP)
    time.sleep(0.5)
    os.kill(first, signal.SIGTERM)
    time.sleep(1.5)                                      # what comes sooner is an echo of the first
    began = time.monotonic()
    os.kill(first, signal.SIGUSR1)
    while Path(f"/proc/{first}/stat").exists() and " Z " not in Path(f"/proc/{first}/stat").read_text():
        assert time.monotonic() - began < 2
        time.sleep(0.01)
    os.kill(other, signal.SIGCONT)
    assert job.wait() == 128 + signal.SIGTERM, job.text()
    assert "without a save" in job.status()["reason"] and not list((job.run_dir / "checkpoints").iterdir())


@pytest.mark.slow
def test_without_time_for_a_save_the_run_leaves(tmp_path):
    job = Job(tmp_path, *TWO, "run.grace_s=0", steps=20000).wait_for(5)
    job.process.send_signal(signal.SIGTERM)
    assert job.wait(20) == 128 + signal.SIGTERM
    assert "the save is not done" in job.status()["reason"]


@pytest.mark.slow
def test_a_rank_killed_anywhere_is_made_good(undisturbed, tmp_path, seed):
    draw = random.Random(seed)
    job = Job(tmp_path, *TWO).wait_for(draw.randrange(1, 32))
    time.sleep(draw.random() * 0.05)
    os.kill(draw.choice(job.workers()), signal.SIGKILL)
    assert job.wait() == 0, job.text()
    assert "restart 1 of 3" in job.text()
    assert job.losses() == undisturbed.losses()


@pytest.mark.slow
def test_torchrun_restarts_its_ranks_over_gloo(undisturbed, tmp_path):
    job = Job(tmp_path, "parallel=ep", torchrun=2).wait_for(15)
    os.kill(job.workers()[0], signal.SIGKILL)
    assert job.wait() == 0, job.text()
    assert job.losses() == undisturbed.losses() and job.status()["code"] == 0


@pytest.mark.full                        # tests/launch/test_nodes.py stops torchrun, too
def test_torchrun_told_to_stop_leaves_the_code_in_status_json(tmp_path):
    job = Job(tmp_path, "parallel=ep", torchrun=2, steps=20000).wait_for(12)
    os.kill(job.workers()[1], signal.SIGUSR1)
    assert job.wait() == 0, job.text()                   # torchrun would restart what fails
    assert job.status()["code"] == 10 and job.status()["step"] == job.steps()[-1]


@pytest.mark.slow
def test_a_second_job_on_the_directory_is_refused_and_disturbs_nothing(tmp_path):
    job = Job(tmp_path, steps=20000).wait_for(3)
    second = Job(tmp_path, steps=20000)
    assert second.wait() == 2
    assert second.text().count("E-CONFIG-091") == 1 and str(job.process.pid) in second.text()
    assert not (job.run_dir / "status.json").exists()
    job.wait_for(job.steps()[-1] + 2)
    job.process.kill()
    job.wait()
    # The lock of a dead process is taken over
    third = Job(tmp_path, steps=20000, ).wait_for(job.steps()[-1] + 2)
    third.process.kill()
    third.wait()


@pytest.mark.slow
def test_a_run_that_always_crashes_at_one_step_is_stopped(tmp_path):
    job = Job(tmp_path, "run.stop_at=10", steps=20000)
    assert job.wait() == 0
    attempts = job.run_dir / "log" / "attempts.jsonl"
    for crash in range(1, 4):
        job = Job(tmp_path, "checkpoint.interval=0", steps=20000)
        while attempts.read_text().count('"start": 10') < crash:
            assert job.process.poll() is None, job.text()
            time.sleep(0.02)
        job.process.kill()
        job.wait()
    last = Job(tmp_path, "checkpoint.interval=0", steps=20000)
    assert last.wait() == 17, last.text()
    assert last.text().count("E-LOOP-001") == 1 and last.status()["code"] == 17
    attempts.unlink()                                    # as the message says
    assert Job(tmp_path, "run.stop_at=12", steps=20000).wait() == 0


@pytest.mark.slow
def test_told_to_stop_while_it_starts_a_run_leaves_in_order_however_often(tmp_path):
    for _ in range(4):                                   # three crashes would end the run with 17
        job = Job(tmp_path, steps=3)
        began = time.monotonic()
        attempts = job.run_dir / "log" / "attempts.jsonl"
        before = attempts.read_text().count('"start"') if attempts.exists() else 0
        while not (attempts.exists() and attempts.read_text().count('"start"') > before):
            assert job.process.poll() is None and time.monotonic() < began + 60, job.text()
            time.sleep(0.005)
        os.kill(job.process.pid, signal.SIGTERM)
        assert job.wait() in (143, 10), job.text()       # 10 where the first step had begun
        assert job.status()["code"] in (143, 10)
    assert Job(tmp_path, steps=3).wait() == 0


@pytest.mark.slow
def test_ranks_whose_launcher_is_killed_save_and_leave(tmp_path):
    job = Job(tmp_path, *TWO, "checkpoint.interval=0", steps=20000).wait_for(5)
    ranks = job.workers()
    os.kill(job.process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{rank}").exists() for rank in ranks):
        assert time.monotonic() < deadline, "ranks train on without their launcher"
        time.sleep(0.1)
    assert job.status()["code"] == 10 and job.status()["step"] == job.steps()[-1]


@pytest.mark.slow
def test_an_evaluation_that_a_signal_put_off_is_made_good(tmp_path):
    job = Job(tmp_path, "eval.interval=1", steps=5000).wait_for(5)
    os.kill(job.process.pid, signal.SIGTERM)
    assert job.wait() == 10, job.text()
    stopped = job.steps()[-1]
    assert Job(tmp_path, "eval.interval=1", f"run.stop_at={stopped + 2}", steps=5000).wait() == 0
    evaluated = [json.loads(line)["step"] for line in (job.run_dir / "eval.jsonl").read_text().splitlines()]
    assert evaluated == list(range(1, stopped + 3))


@pytest.mark.slow
# That a failed write changes nothing: tests/checkpoint/test_commit.py
@pytest.mark.full
def test_a_config_that_cannot_be_written_stays_as_it_was_and_ends_all_ranks(tmp_path):
    assert Job(tmp_path, *TWO, steps=2).wait() == 0
    config = tmp_path / "run" / "config.yaml"
    before = config.read_bytes()
    config.with_name("config.yaml.tmp").mkdir()          # in the way of the draft
    stopped = Job(tmp_path, *TWO, steps=4)
    assert stopped.wait() == 14 and "E-DISK-003" in stopped.text() and "Traceback" not in stopped.text()
    assert config.read_bytes() == before
    config.with_name("config.yaml.tmp").rmdir()
    assert Job(tmp_path, *TWO, steps=4).wait() == 0


@pytest.mark.slow
@pytest.mark.parametrize("frozen, named", [
    pytest.param(1, "rank 1, which does not answer", marks=pytest.mark.full), (0, "rank 0 or its machine")])
def test_a_rank_that_hangs_is_named(tmp_path, frozen, named):
    job = Job(tmp_path, *TWO, "run.timeout_s=10", "run.max_restarts=0", steps=20000).wait_for(3)
    os.kill(job.workers()[frozen], signal.SIGSTOP)
    assert job.wait() == 16, job.text()
    assert job.status()["code"] == 16 and job.status()["reason"].startswith(f"rank {frozen} is stopped")
    text = "".join(path.read_text() for path in (job.run_dir / "log").glob("*.log")) + job.text()
    assert named in text and "Traceback" not in text, text


@pytest.mark.full                        # one that is put off is made good above
def test_told_to_stop_in_the_last_evaluation_the_run_has_saved_and_evaluates_when_it_goes_on(tmp_path):
    words = ("eval.windows=400", "eval.batch=1", "data.num_domains=4")
    job = Job(tmp_path, *words, steps=3)
    saved = job.run_dir / "checkpoints" / "step-00000003" / "manifest.json"
    while not saved.exists():
        assert job.process.poll() is None, job.text()
        time.sleep(0.01)
    os.kill(job.process.pid, signal.SIGTERM)
    assert job.wait() == 10, job.text()
    evaluated = job.run_dir / "eval.jsonl"
    assert not evaluated.exists() and job.status()["step"] == 3
    again = Job(tmp_path, *words, steps=3)
    assert again.wait() == 0, again.text()
    assert [json.loads(line)["step"] for line in evaluated.read_text().splitlines()] == [3]
    before = {path: path.stat().st_mtime_ns for path in job.run_dir.rglob("*")}
    assert Job(tmp_path, *words, steps=3).wait() == 0                    # nothing is left to do
    assert {path: path.stat().st_mtime_ns for path in job.run_dir.rglob("*")} == before


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_while_costs_the_saves_of_that_time_alone(tmp_path):
    """A real small file system, in name spaces of its own."""
    alone = ["unshare", "--mount", "--map-root-user"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("this machine allows no name spaces")
    disk = tmp_path / "disk"
    disk.mkdir()
    train = [sys.executable, "-m", "moetrain", "train", *SMALL, *TWO, "run.dir=disk/run", "run.steps=200",
             "checkpoint.interval=20",
             "checkpoint.max_failed_saves=50", "eval.interval=0", "checkpoint.keep=2"]
    script = f"""
        mount -t tmpfs -o size=24m none disk
        seen() {{ until grep -q "$1" "$2" || [ -e code ]; do sleep .02; done; }}
        (seen '"step": 30,' disk/run/metrics.jsonl; cat /dev/zero > disk/filler; truncate -s -200K disk/filler
         seen 'step 80 failed' output; rm disk/filler) 2> /dev/null &
        {shlex.join(train)} > output 2>&1
        echo $? > code; wait; cp -r disk/run kept"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([*alone, "bash", "-c", script], cwd=tmp_path, env=environment, timeout=400, check=True)
    text = (tmp_path / "output").read_text()
    assert (tmp_path / "code").read_text() == "0\n", text
    lines = (tmp_path / "kept" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 201))
    assert "the save of step 40 failed" in text and "No space left" in text
    assert (sorted(path.name for path in (tmp_path / "kept" / "checkpoints").iterdir())
            == ["step-00000180", "step-00000200"])
