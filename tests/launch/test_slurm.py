"""launch/slurm.sbatch and `moetrain slurm` in a real Slurm: two nodes on this machine."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.ranks import free_port
from tests.support.runs import ROOT, TINY, ranks, status, steps, until
from tests.support.slurm_cluster import Cluster, running_cluster

pytestmark = [pytest.mark.slow, pytest.mark.ranks]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as running:
        yield running


@pytest.fixture(autouse=True)
def no_job_is_left(cluster: Cluster) -> Iterator[None]:
    yield
    cluster.empty()


def submit(cluster: Cluster, run: Path, *overrides: str, **settings: str) -> str:
    """The number of a job with one rank on each of two nodes."""
    return cluster.call("sbatch", "--parsable", "--nodes=2", f"--chdir={ROOT}", f"--output={run}.log",
                        f"{ROOT}/launch/slurm.sbatch",
                        *TINY, f"run.dir={run}", *overrides, NPROC="1", PYTHON=sys.executable,
                        PORT=str(free_port()), **settings)


def test_a_job_on_two_nodes_trains(cluster: Cluster, tmp_path: Path) -> None:
    """Submitted by `moetrain slurm`, which writes the script."""
    run = tmp_path / "run"
    done = subprocess.run([sys.executable, "-m", "moetrain", "slurm", "--nodes", "2", "--nproc-per-node=1",
                           "--time=10", "--lead=60",
                           *TINY, "run.steps=6", f"run.dir={run}"], cwd=ROOT, text=True, capture_output=True,
                          # The default follows from the job's number; other clusters here count from 1, too
                          env={**cluster.environment, "PORT": str(free_port())})
    assert done.returncode == 0, done.stderr
    number = done.stdout.split()[1].strip(":")
    job = cluster.finished(number)
    log = (run / "log" / f"slurm-{number}.log").read_text()
    assert ((job["JobState"], job["ExitCode"], job["TimeLimit"], job["NumNodes"])
            == ("COMPLETED", "0:0", "00:10:00", "2")), log
    assert "2 ranks" in log and status(run)["code"] == 0 and steps(run) == list(range(1, 7))


def test_a_sweep_is_an_array_whose_tasks_know_their_run_and_their_nodes(
        cluster: Cluster, tmp_path: Path) -> None:
    """What each task of the array starts on each node.

    It is the task's own run, with the GPUs and cores of the node and with what the prologue exported.
    """
    (tmp_path / "setup.sh").write_text("set -- other arguments\nexport GREETING='good morning'\n")
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\necho "$SLURM_NODEID $NPROC $SLURM_GPUS_ON_NODE $SLURM_CPUS_PER_TASK '
                       f'$GREETING: $*" >> {tmp_path}/started-$SLURM_ARRAY_TASK_ID\n')
    program.chmod(0o755)
    done = subprocess.run([sys.executable, "-m", "moetrain", "slurm", "-N2", "--gpus=4", "--time=10",
                           f"--setup={tmp_path}/setup.sh",
                           f"--python={program}", "-m", *TINY, f"run.dir={tmp_path}/run", "run.seed=1,2"],
                          cwd=ROOT, text=True, capture_output=True, env=cluster.environment)
    assert done.returncode == 0 and ", 2 runs: " in done.stdout, done.stderr
    until(lambda: not cluster.call("squeue", "--noheader"))
    for task, seed in enumerate((1, 2)):
        started = sorted((tmp_path / f"started-{task}").read_text().splitlines())
        assert len(started) == 2
        for node, line in enumerate(started):            # two GPUs are all of a node, and so are its cores
            assert (line.startswith(f"{node} 2 2 2 good morning: -m moetrain.launch {TINY[0]}")
                    and line.endswith(f" run.dir={tmp_path}/run-seed-{seed}"))
    assert "#SBATCH --mem=0" in (tmp_path / "run" / "job.sbatch").read_text()


def test_a_preempted_job_saves_and_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    number = submit(cluster, run, "run.steps=40")
    until(lambda: len(steps(run)) > 3)
    # What --signal=USR1@<lead> sends before the time limit
    cluster.call("scancel", "--signal=USR1", number)
    until(lambda: cluster.job(number)["Restarts"] == "1")
    saved = sorted(path.name for path in (run / "checkpoints").glob("step-*"))[-1]
    job = cluster.finished(number)
    log = Path(f"{run}.log").read_text()
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "1"), log
    assert "exit code 10, back into the queue" in log and f"checkpoints/{saved}" in log
    assert status(run)["code"] == 0 and steps(run) == list(range(1, 41))
    assert not (run / "metrics.jsonl.lost").exists()        # saved at the step at which it stopped


def test_a_lost_rank_requeues_the_job_so_often(cluster: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    number = submit(cluster, run, "run.steps=100000", RESTARTS="0", MAX_REQUEUES="0")
    until(lambda: len(steps(run)) > 1)
    for rank in ranks(run):
        os.kill(rank, signal.SIGKILL)
    job = cluster.finished(number)
    log = Path(f"{run}.log").read_text()
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "16:0", "0"), log
    assert "MAX_REQUEUES" in log and status(run)["code"] == 16


@pytest.mark.full
def test_a_job_that_cannot_go_better_is_not_requeued(cluster: Cluster, tmp_path: Path) -> None:
    number = submit(cluster, tmp_path / "run", "data=tokens", f"data.path={tmp_path}/none")
    job = cluster.finished(number)
    assert ((job["JobState"], job["ExitCode"], job["Restarts"])
            == ("FAILED", "12:0", "0")), Path(f"{tmp_path}/run.log").read_text()


def test_slurm_says_why_it_refuses(cluster: Cluster, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "moetrain", "slurm", "--nodes=2", "--partition=none", *TINY,
                           f"run.dir={tmp_path}/run"],
                          env=cluster.environment, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 2 and "E-CONFIG-048" in done.stderr and "partition" in done.stderr
