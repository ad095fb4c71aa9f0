"""`moetrain train` in processes of its own, to be signalled, killed, and read while it goes on."""

import fcntl
import json
import os
import shlex
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from pathlib import Path

from tests.support import warm_start

ROOT = Path(__file__).parents[2]
SMALL = ["model=debug", "optim=adamw", "data=synthetic", "log.wandb=off", "train.global_batch=8",
         "train.seq_len=32", "model.dim=32", "model.expert_dim=32", "checkpoint.interval=10",
         "eval.windows=1", "log.interval=1000"]
TWO = ["run.nproc=2", "parallel=ep"]


class Job:
    """`moetrain train` (or torchrun around it) in a process of its own."""

    def __init__(self, directory: Path, *overrides: str, torchrun: int = 0, steps: int = 40,
                 command: Sequence[str] = (), shell: str = "", terminal: int | None = None,
                 path: Path | None = None) -> None:
        """Start it.

        Args:
            directory: the run is `run` in it; what is said goes to the file `output`.
            *overrides: of the run, after SMALL.
            torchrun: ranks that torchrun starts.
            steps: run.steps.
            command: words after `moetrain`, instead of those that train SMALL.
            shell: redirections and pipes of a shell behind the command, as "| head -1".
            terminal: descriptor of a terminal that the process has for its own, and writes to.
            path: a folder before the others on PYTHONPATH.
        """
        self.run_dir = directory / "run"
        words = command or ["train", *SMALL, f"run.dir={self.run_dir}", f"run.steps={steps}", *overrides]
        agent = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(torchrun),
                 "--max-restarts", "3"]
        words = [sys.executable, *(agent if torchrun else []), "-m", "moetrain", *words]
        if shell:
            words = ["bash", "-c", f"set -o pipefail; {shlex.join(words)} {shell}"]
        environment = {name: value for name, value in os.environ.items()
                       if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        folders = map(str, filter(None, (path, ROOT)))
        environment |= {"PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1",
                        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        self.output = (directory / "output").open("ab")
        streams = {"stdout": self.output, "stderr": self.output}
        if terminal is not None:
            streams = {"stdin": terminal, "stdout": terminal, "stderr": terminal, "start_new_session": True,
                       "preexec_fn": lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)}
        self.process = warm_start.Popen(words, cwd=directory, env=environment, **streams)

    def wait(self, limit: float = 300) -> int:
        return self.process.wait(limit)

    def wait_for(self, step: int, limit: float = 240) -> "Job":
        deadline = time.monotonic() + limit
        while self.steps()[-1:] < [step]:
            assert self.process.poll() is None and time.monotonic() < deadline, self.text()
            time.sleep(0.02)
        return self

    def workers(self) -> list[int]:
        """Process ids of the ranks."""
        pgrep = ["pgrep", "-f", "-P", str(self.process.pid), "moetrain"]
        found = subprocess.run(pgrep, capture_output=True, text=True).stdout.split()
        return [int(pid) for pid in found]

    def steps(self) -> list[int]:
        return [int(record["step"]) for record in self.records()]

    def records(self) -> list[dict]:
        try:
            lines = (self.run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def losses(self) -> list[tuple[int, str]]:
        return [(int(record["step"]), float(record["loss/ce"]).hex()) for record in self.records()]

    def status(self) -> dict:
        return json.loads((self.run_dir / "status.json").read_text())

    def text(self) -> str:
        return (self.run_dir.parent / "output").read_text()
