"""moetrain slurm [--nodes N] [--gpus-per-node G] [options] [key=value ...]: train in a Slurm job.

Checks the config for the ranks that the job will have, writes <run.dir>/job.sbatch and submits it. The job saves before
its time limit and when it is preempted, goes back into the queue, and goes on by itself.

    --nodes N             nodes (1)
    --gpus-per-node G     GPUs of each node, one rank on each; without it one rank on the CPUs
    --nproc-per-node P    ranks on each node instead of one for each GPU
    --time T              time limit, as 24:00:00 or 2-00:00:00
    --partition P         partition
    --account A           account
    --lead S              seconds before the time limit at which the ranks save (300): more than a step and a save
    --dry-run             print the script and submit nothing
    --<option>[=value]    any other option of sbatch, as --exclusive, --qos=long, --cpus-per-task=16

    moetrain slurm --nodes 2 --gpus-per-node 8 --time 24:00:00 parallel=ep parallel.ep=8 run.name=big
    moetrain slurm --dry-run --nodes 2 parallel=ddp experiment=debug
"""

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import moetrain
from moetrain.config.compose import run_dir
from moetrain.config.schema import Config
from moetrain.errors import ConfigError, ConfigErrors, DiskError
from moetrain.nodes.node import config_for

_OURS = {"--nodes": int, "--gpus-per-node": int, "--nproc-per-node": int, "--lead": int,
         "--time": str, "--partition": str, "--account": str}
# What the script needs to be as it is.
_FIXED = {"--ntasks", "--ntasks-per-node", "--signal", "--requeue", "--no-requeue", "--open-mode", "--output", "--chdir",
          "--job-name", "--array", "--wrap"}


@dataclass
class Job:
    """What the command line asks for."""

    values: dict[str, str] = field(default_factory=dict)      # by our options
    others: list[str] = field(default_factory=list)           # options of sbatch, as given
    overrides: list[str] = field(default_factory=list)
    dry_run: bool = False

    def number(self, option: str, default: int) -> int:
        return int(self.values.get(option, default))

    @property
    def nproc(self) -> int:
        return self.number("--nproc-per-node", self.number("--gpus-per-node", 1))

    @property
    def ranks(self) -> int:
        return self.number("--nodes", 1) * self.nproc


def run(argv: list[str]) -> int:
    if "-h" in argv or "--help" in argv:
        print(str(__doc__).strip())
        return 0
    job, errors = parse(argv)
    try:
        config = config_for(job.overrides, job.ranks)
    except ConfigErrors as found:
        errors += found.errors
    if errors:
        raise ConfigErrors(errors)
    text = script(job, config)
    if job.dry_run:
        print(text, end="")
        return 0
    if shutil.which("sbatch") is None:
        raise ConfigError(47, "sbatch is not on this machine", where="PATH", why="jobs are submitted with Slurm's sbatch",
                          next="run this on a login node of the cluster; --dry-run prints the script")
    path = write(text, run_dir(config))
    _submit(path)
    return 0


def parse(argv: list[str]) -> tuple[Job, list[ConfigError]]:
    """The job, and everything that is wrong with its options."""
    job, errors = Job(), []
    words = iter(argv)
    for word in words:
        option, given, value = word.partition("=")
        if not word.startswith("-"):
            job.overrides.append(word)
        elif word == "--dry-run":
            job.dry_run = True
        elif option in _OURS:
            value = value if given else next(words, "")
            if _fits(value, _OURS[option]):
                job.values[option] = value
            else:
                errors.append(_wrong(f"{option} {value}".rstrip(), *_wanted(option)))
        elif option in _FIXED or not re.fullmatch(r"--[a-z][a-z-]*", option) or "\n" in word:
            why = ("the script sets it itself" if option in _FIXED
                   else "options of sbatch are written --option or --option=value")
            errors.append(_wrong(word, why, "moetrain slurm --help lists the options"))
        else:
            job.others.append(word)
    return job, errors


def script(job: Job, config: Config) -> str:
    """The job script: the settings of this run, then launch/slurm.sbatch without its header."""
    directory = run_dir(config)
    options = [f"--job-name={config.run.name}", f"--nodes={job.number('--nodes', 1)}", "--ntasks-per-node=1",
               *(f"{name}={job.values[name]}" for name in ("--gpus-per-node", "--time", "--partition", "--account")
                 if name in job.values),
               f"--signal=USR1@{job.number('--lead', 300)}", "--requeue", "--open-mode=append",
               f"--chdir={Path.cwd()}", f"--output={(directory / 'log').absolute()}/slurm-%j.log", *job.others]
    lines = ["#!/usr/bin/env bash", "# Written by moetrain slurm. Submit it again with sbatch to go on with the run.",
             *(f"#SBATCH {_quoted(option)}" for option in options), "",
             f"PYTHON={shlex.quote(sys.executable)}",
             f"export NPROC={job.nproc}",
             f"set -- {shlex.join(job.overrides)}".rstrip(), ""]
    return "\n".join([*lines, template().partition("\n\n")[2]])


def template() -> str:
    """launch/slurm.sbatch: inside the package in a wheel, beside it in a checkout."""
    package = Path(moetrain.__file__).resolve().parent
    inside = package / "scripts" / "slurm.sbatch"
    return (inside if inside.is_file() else package.parent / "launch" / "slurm.sbatch").read_text(encoding="utf-8")


def write(text: str, directory: Path) -> Path:
    path = directory / "job.sbatch"
    try:
        (directory / "log").mkdir(parents=True, exist_ok=True)       # Slurm does not make it
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DiskError(21, "the job script cannot be written", where=str(path), why=str(error),
                        next="run.dir=<a directory that can be written>") from error
    return path


def _submit(path: Path) -> None:
    done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True)
    if done.returncode:
        said = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in done.stderr.splitlines() if line.strip()]
        raise ConfigError(48, "Slurm refused the job", where=str(path), why="; ".join(said) or "sbatch said nothing",
                          next="correct the option of sbatch that is named, and submit again")
    number = done.stdout.strip().partition(";")[0]
    print(f"job {number}: {path}\n  log   {path.parent}/log/slurm-{number}.log\n"
          f"  next  squeue --job {number}    scancel --signal=USR1 {number} saves and requeues    scancel {number} ends it")


def _fits(value: str, kind: type) -> bool:
    if kind is int:
        return value.isdigit() and int(value) > 0
    return bool(value) and not value.startswith("-") and "\n" not in value


def _wanted(option: str) -> tuple[str, str]:
    if _OURS[option] is int:
        return "it is a whole number from 1", f"{option} 2"
    return "it takes a value", f"{option} <value>"


def _wrong(what: str, why: str, next: str) -> ConfigError:
    return ConfigError(49, what, where="the command line", why=why, next=next)


def _quoted(option: str) -> str:
    """For a line of #SBATCH, which knows double quotes."""
    name, given, value = option.partition("=")
    escaped = re.sub(r'(["\\])', r"\\\1", value)
    return option if not re.search(r"[\s\"\\]", value) else f'{name}{given}"{escaped}"'
