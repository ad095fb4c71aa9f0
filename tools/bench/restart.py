"""Time that a killed rank costs: from SIGKILL to the first step that is trained again.

    python -m tools.bench.restart [--trials 10] [--launcher nproc|torchrun]

The tiny model of the tests on two ranks (gloo), a save every 10 steps. Each trial kills a random rank at a
random step and waits for the next line of metrics.jsonl that a new process wrote. Prints every trial, median
and 95th percentile, and writes docs/results/restart.md with --write.
"""

import argparse
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
TINY = ["model=debug", "optim=adamw", "data=synthetic", "log.wandb=off", "train.global_batch=8",
        "train.seq_len=32", "model.dim=32", "model.expert_dim=32", "checkpoint.interval=10",
        "log.interval=1000", "run.steps=100000", "parallel=ep"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--launcher", choices=("nproc", "torchrun"), default="nproc")
    parser.add_argument("--write", action="store_true", help="write docs/results/restart.md")
    options = parser.parse_args()
    seconds = [trial(seed, options.launcher) for seed in range(options.trials)]
    text = report(seconds, options.launcher)
    print(text)
    if options.write:
        (ROOT / "docs" / "results" / "restart.md").write_text(text, encoding="utf-8")


def trial(seed: int, launcher: str) -> float:
    """Seconds from the kill of a rank to the first step that is trained again."""
    draw, folder = random.Random(seed), Path(tempfile.mkdtemp())
    command = ["-m", "moetrain", "train", *TINY, f"run.dir={folder / 'run'}"]
    if launcher == "torchrun":
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [*torchrun, "--max-restarts", "3", *command]
    else:
        command.append("run.nproc=2")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
                   "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with (folder / "output").open("wb") as output:
        job = subprocess.Popen([sys.executable, *command], cwd=folder, env=environment,
                               stdout=output, stderr=output)
    metrics = folder / "run" / "metrics.jsonl"
    try:
        kill_at = draw.randrange(12, 40)
        wait(lambda: last_step(metrics) >= kill_at, job)
        ranks = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
        before, killed = attempts(folder), time.monotonic()
        os.kill(int(draw.choice(ranks)), signal.SIGKILL)
        # The new rank 0 is at work; then it cuts the file and goes on.
        wait(lambda: attempts(folder) > before, job)
        wait(lambda: 0 < last_step(metrics) % 10 or last_step(metrics) > kill_at + 40, job)
        started = metrics.stat().st_mtime
        wait(lambda: metrics.stat().st_mtime > started, job)
        found = time.monotonic() - killed
    finally:
        job.send_signal(signal.SIGTERM)
        job.wait(60)
        shutil.rmtree(folder)
    print(f"trial {seed}: {found:.2f} s", flush=True)
    return found


def wait(ready, job: subprocess.Popen, limit: float = 120) -> None:
    """Wait until `ready()`; end with an error if the run ends before, or after `limit` seconds."""
    deadline = time.monotonic() + limit
    while not ready():
        if job.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"the run ended with {job.poll()} or did not get on")
        time.sleep(0.01)


def last_step(metrics: Path) -> int:
    """Step of the last whole line of metrics.jsonl; 0 without one."""
    try:
        lines = metrics.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return 0
    whole = [line for line in lines[-2:] if line.endswith(b"\n")]
    return int(json.loads(whole[-1])["step"]) if whole else 0


def attempts(folder: Path) -> int:
    """Number of starts that the run has recorded."""
    return (folder / "run" / "log" / "attempts.jsonl").read_text().count('"start"')


def report(seconds: list[float], launcher: str) -> str:
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    ordered = sorted(seconds)
    p95 = ordered[min(len(ordered) - 1, -(-95 * len(ordered) // 100) - 1)]
    return "\n".join([
        "# Restart after a killed rank", "",
        "Time from SIGKILL of a random rank at a random step to the first step that is trained again, in "
        f"{len(seconds)} trials with two ranks over gloo",
        f"and the tests' tiny model, started by {'run.nproc=2' if launcher == 'nproc' else 'torchrun'}.", "",
        "| median | 95th percentile | longest |", "|---|---|---|",
        f"| {statistics.median(ordered):.1f} s | {p95:.1f} s | {ordered[-1]:.1f} s |", "",
        f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}, commit {commit},"
        f" {time.strftime('%Y-%m-%d')}. Most of this time is the import of torch.",
        f"To repeat it: `python -m tools.bench.restart --trials {len(seconds)} --launcher {launcher}`.", "",
    ])


if __name__ == "__main__":
    main()
