"""moetrain slurm [--nodes N] [--gpus-per-node G] [options] [key=value ...]: train in a Slurm job.

Checks the config for the ranks that the job will have, writes <run.dir>/job.sbatch
and submits it. The job saves before its time limit and when it is preempted, goes
back into the queue, and goes on by itself.

    --nodes N             nodes (1)
    --gpus-per-node G     GPUs of each node, one rank on each; --gpus, --gres,
                          --gpus-per-task and -G are understood too; without any,
                          one rank on the CPUs
    --nproc-per-node P    ranks on each node instead of one for each GPU
    --time T              time limit, as 2-00:00:00 (24 hours, or the partition's
                          limit if that is shorter)
    --partition P         partition
    --account A           account
    --lead S              seconds before the time limit at which the ranks save
                          (300): more than a step and a save
    --setup FILE          shell commands that the job begins with: modules, NCCL
                          variables; sourced by bash
    --python PATH         interpreter that has moetrain (this one; inside a
                          container python3)
    --container-...=...   options of srun for containers, as
                          --container-image=IMAGE --container-mounts=/data,/home/me
    -m                    values separated by commas make one array job, a run for
                          each combination
    --at-once N           so many of them at a time
    --dry-run             print the script and submit nothing
    --<option>[=value]    any other option of sbatch, as --exclusive, --qos=long,
                          --cpus-per-task=16, --mem=200G; without them a job takes
                          the share of a node's cores and memory that it takes of
                          its GPUs

    moetrain slurm --nodes 2 --gpus-per-node 8 parallel=ep parallel.ep=8
    moetrain slurm --dry-run --nodes 2 parallel=ddp experiment=debug
    moetrain slurm --gpus-per-node 1 -m router=topk,sigmoid run.seed=1,2,3
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import moetrain
from moetrain.config.compose import run_dir
from moetrain.config.recipes import advice
from moetrain.config.schema import Config
from moetrain.config.sweep import sweep_jobs
from moetrain.errors import ConfigError, ConfigErrors, DiskError
from moetrain.launch.node import config_for
from moetrain.launch.slurm_node import node_shapes, resource_options
from moetrain.launch.slurm_options import Job, parse


class Submission(NamedTuple):
    """Everything that goes into a job script."""

    job: Job
    config: Config              # of the first run, which names the job
    runs: list[list[str]]       # the overrides of each run, several in a sweep
    resources: list[str]        # options of sbatch for cores and memory

    @property
    def directory(self) -> Path:
        """The directory that gets the script and the logs of Slurm."""
        return run_dir(self.config)


def run(argv: list[str]) -> int:
    """Run the verb on the words that follow it; returns the exit code."""
    submission = prepare(argv)
    text = script(submission)
    if submission.job.dry_run:
        print(text, end="")
        return 0
    if shutil.which("sbatch") is None:
        raise ConfigError(
            47, "sbatch is not on this machine", where="PATH",
            why="jobs are submitted with Slurm's sbatch",
            next="run this on a login node of the cluster; --dry-run prints the script")
    path = write(text, submission.directory)
    _submit(path, len(submission.runs))
    return 0


def prepare(argv: Sequence[str]) -> Submission:
    """Read and check a command line. Raises ConfigErrors with everything that is wrong."""
    job, errors = parse(argv, os.environ)
    if "--setup" in job.values and not Path(job.values["--setup"]).is_file():
        errors.append(ConfigError(
            180, f"--setup {job.values['--setup']} is not there", where="the command line",
            why="the job begins with the commands in that file",
            next="--setup <an existing file>"))
    runs: list[list[str]] = []
    try:
        swept = sweep_jobs(job.overrides, lambda words: config_for(words, job.ranks)) if job.sweep else []
        runs = [one.words for one in swept] or [job.overrides]
        config = swept[0].config if swept else config_for(job.overrides, job.ranks)
    except ConfigErrors as found:
        errors += found.errors
    if errors:
        raise ConfigErrors(errors)
    if text := advice(config):
        print(text, file=sys.stderr)
    shapes = node_shapes(job.values.get("--partition"))
    if not shapes and not (job.sets_cpus and job.sets_memory):
        print("moetrain: sinfo does not tell what the nodes have; the job takes the cores and memory "
              "that the cluster gives by default. --cpus-per-task and --mem ask for more", file=sys.stderr)
    return Submission(job, config, runs, resource_options(job, shapes))


def script(submission: Submission) -> str:
    """Write the job script: the settings of this run, then launch/slurm.sbatch without its header."""
    job, config, runs, resources = submission
    sweep = job.sweep
    log = f"--output={(submission.directory / 'log').absolute()}/slurm-{'%A_%a' if sweep else '%j'}.log"
    options = [f"--job-name={config.run.name}", f"--nodes={job.nodes}", "--ntasks-per-node=1",
               *(f"{name}={job.values[name]}" for name in ("--time", "--partition", "--account")
                 if name in job.values),
               *resources, *([_array(job, len(runs))] if sweep else []),
               f"--signal=USR1@{job.values.get('--lead', 300)}", "--requeue", "--open-mode=append",
               f"--chdir={Path.cwd()}", log,
               *job.sbatch_options]
    python = job.values.get("--python", "python3" if job.srun_options else sys.executable)
    setup = [str(Path(job.values["--setup"]).absolute())] if "--setup" in job.values else []
    lines = ["#!/usr/bin/env bash",
             "# Written by moetrain slurm. Submit it again with sbatch to go on with the run.",
             *(f"#SBATCH {_quoted(option)}" for option in options), "",
             f"PYTHON={shlex.quote(python)}",
             *(f"SETUP={shlex.quote(path)}" for path in setup),
             f"export NPROC={job.nproc}",
             f"step_options=({shlex.join(job.srun_options)})",
             *(_case(runs) if sweep else [f"set -- {shlex.join(runs[0])}".rstrip()]), ""]
    return "\n".join([*lines, template().partition("\n\n")[2]])


def template() -> str:
    """Read launch/slurm.sbatch: inside the package in a wheel, beside it in a checkout."""
    package = Path(moetrain.__file__).resolve().parent
    inside, beside = package / "scripts" / "slurm.sbatch", package.parent / "launch" / "slurm.sbatch"
    return (inside if inside.is_file() else beside).read_text(encoding="utf-8")


def write(text: str, directory: Path) -> Path:
    """Write the job script, and make the folder of logs, which Slurm does not."""
    path = directory / "job.sbatch"
    try:
        (directory / "log").mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DiskError(21, "the job script cannot be written", where=str(path), why=str(error),
                        next="run.dir=<a directory that can be written>") from error
    return path


def _submit(path: Path, runs: int) -> None:
    done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True)
    if done.returncode:
        said = [line.removeprefix("sbatch: ").removeprefix("error: ")
                for line in done.stderr.splitlines() if line.strip()]
        raise ConfigError(
            48, "Slurm refused the job", where=str(path),
            why="; ".join(said) or "sbatch said nothing",
            next="correct the option of sbatch that is named, and submit again")
    number = done.stdout.strip().partition(";")[0]
    several = runs > 1
    print(f"job {number}{f', {runs} runs' * several}: {path}\n"
          f"  log   {path.parent}/log/slurm-{number}{'_<run>' * several}.log\n"
          f"  next  squeue --job {number}    scancel --signal=USR1 {number} saves and requeues    "
          f"scancel {number} ends it")


def _array(job: Job, runs: int) -> str:
    at_once = job.values.get("--at-once")
    return f"--array=0-{runs - 1}" + (f"%{at_once}" if at_once else "")


def _case(runs: list[list[str]]) -> list[str]:
    """Write the lines by which each task of the array trains the run of its number."""
    cases = [f"{number}) set -- {shlex.join(words)} ;;" for number, words in enumerate(runs)]
    return ['case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac"]


def _quoted(option: str) -> str:
    """Quote an option for a line of #SBATCH, which knows double quotes only."""
    name, given, value = option.partition("=")
    escaped = re.sub(r'(["\\])', r"\\\1", value)
    return option if not re.search(r"[\s\"\\]", value) else f'{name}{given}"{escaped}"'
