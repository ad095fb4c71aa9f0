"""Command line of `moetrain slurm`: its own options, those for sbatch and srun, and the ranks that follow.

A node runs one rank for each of its GPUs. Every option by which Slurm assigns GPUs is either read or refused.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from moetrain.errors import ConfigError

# sbatch's short forms of the options that are read here or often typed.
_SHORT = {"-N": "--nodes", "-G": "--gpus", "-t": "--time", "-p": "--partition", "-A": "--account",
          "-c": "--cpus-per-task", "-q": "--qos", "-C": "--constraint", "-w": "--nodelist", "-x": "--exclude",
          "-d": "--dependency"}
_NUMBERS = ("--nodes", "--nproc-per-node", "--lead", "--at-once")
_STRINGS = ("--time", "--partition", "--account", "--setup", "--python")
# The job script depends on its own values of these.
_FIXED = {"--ntasks", "--ntasks-per-node", "--signal", "--requeue", "--no-requeue", "--open-mode", "--output",
          "--chdir", "--job-name", "--array", "--wrap"}
# The number of GPUs on a node does not follow from these.
_UNREADABLE = {"--gpus-per-socket", "--ntasks-per-gpu", "--tres-per-socket"}
_CPU_OPTIONS = ("--cpus-per-task", "--cpus-per-gpu", "--exclusive")
_MEMORY_OPTIONS = ("--mem", "--mem-per-cpu", "--mem-per-gpu")


@dataclass
class Job:
    """A job as the command line describes it."""

    values: dict[str, str] = field(default_factory=dict)      # by option, for those that the job script needs
    sbatch_options: list[str] = field(default_factory=list)   # as given
    srun_options: list[str] = field(default_factory=list)     # as given
    gpus: int = 0                                             # on each node
    overrides: list[str] = field(default_factory=list)
    dry_run: bool = False
    sweep: bool = False

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return int(self.values.get("--nodes", 1))

    @property
    def nproc(self) -> int:
        """Ranks on each node: --nproc-per-node, else one for each GPU."""
        return int(self.values.get("--nproc-per-node", self.gpus or 1))

    @property
    def ranks(self) -> int:
        """Ranks on all nodes."""
        return self.nodes * self.nproc

    def has_option(self, options: Sequence[str]) -> bool:
        """Whether the command line gives one of these options of sbatch."""
        return any(word.partition("=")[0] in options for word in self.sbatch_options)

    @property
    def sets_cpus(self) -> bool:
        """Whether the command line says how many cores the job gets."""
        return self.has_option(_CPU_OPTIONS)

    @property
    def sets_memory(self) -> bool:
        """Whether the command line says how much memory the job gets."""
        return self.has_option(_MEMORY_OPTIONS)


def parse(argv: Sequence[str], environ: Mapping[str, str]) -> tuple[Job, list[ConfigError]]:
    """Parse the command line into a job, and list everything that is wrong with its options.

    sbatch also reads options from environment variables, as --gpus from SBATCH_GPUS; those of GPUs count
    here, too.
    """
    job, errors = Job(), []
    requested = {option: environ[name] for option in GPUS
                 if environ.get(name := f"SBATCH_{option[2:].upper().replace('-', '_')}")}
    for option, value, word in _split_options(argv):
        if option is None:
            job.overrides.append(word)
        elif option in ("-m", "--multirun"):
            job.sweep = True
        elif option == "--dry-run":
            job.dry_run = True
        elif option in _NUMBERS or option in _STRINGS:
            if _fits(value, option in _NUMBERS):
                job.values[option] = value
            else:
                errors.append(_wrong(f"{option} {value}".rstrip(), *_expectation(option)))
        elif option in _UNREADABLE:
            errors.append(_wrong(
                word, "the number of GPUs on a node, and so of ranks, does not follow from it",
                "--gpus-per-node=8"))
        elif option in _FIXED or not re.fullmatch(r"--[a-z][a-z-]*", option) or "\n" in word:
            why = ("the script sets it itself" if option in _FIXED
                   else "options of sbatch are written --option or --option=value")
            errors.append(_wrong(word, why, "moetrain slurm --help lists the options"))
        elif option.startswith("--container"):
            job.srun_options.append(word)
        else:
            job.sbatch_options.append(f"{option}={value}" if option in GPUS else word)
            if option in GPUS:
                requested[option] = value
    job.gpus = _gpus(requested, job.nodes, errors)
    return job, errors


def _split_options(argv: Sequence[str]) -> Iterator[tuple[str | None, str, str]]:
    """Yield (option, value, the word as sbatch takes it) for every word; an override has option None.

    `-N 2`, `-N2` and `--nodes 2` all become `--nodes=2`.
    """
    taking_value = {*_NUMBERS, *_STRINGS, *GPUS, *_SHORT.values()}
    words = iter(argv)
    for word in words:
        if not word.startswith("-"):
            yield None, "", word
            continue
        option, given, value = word.partition("=")
        if word[:2] in _SHORT:
            option, given, value = _SHORT[word[:2]], word[2:], word[2:].removeprefix("=")
        if option in taking_value:
            value = value if given else next(words, "")
            word = f"{option}={value}"
        yield option, value, word


# --- GPUs of a node: one parser for each form of value, which gives None where it cannot be read


def _gpus_of_gres(value: str, nodes: int) -> int | None:
    """Parse `gpu:8`, `gpu:h100:8`, `gpu:h100` or `gres/gpu=8`, possibly beside other resources."""
    found = 0
    for entry in value.split(","):
        if not re.match(r"(gres[:/])?gpu\b", entry):
            continue
        parts = re.fullmatch(r"(?:gres[:/])?gpu(?::[A-Za-z][\w.-]*)?(?:[:=](\d+))?(?:\(.*\))?", entry)
        if parts is None:
            return None
        found += int(parts[1] or 1)
    return found


def _gpus_per_node(value: str, nodes: int) -> int | None:
    """Parse `8`, `h100:8` or `h100:4,a100:4`."""
    counts = [re.fullmatch(r"(?:[A-Za-z][\w.-]*:)?(\d+)", entry) for entry in value.split(",")]
    return None if None in counts else sum(int(count[1]) for count in counts if count)


def _gpus_of_job(value: str, nodes: int) -> int | None:
    """Parse the GPUs of all nodes together, which must divide evenly."""
    total = _gpus_per_node(value, nodes)
    return None if total is None or total % nodes else total // nodes


# A node runs one task, so the GPUs of a task are those of the node.
GPUS: dict[str, Callable[[str, int], int | None]] = {
    "--gpus-per-node": _gpus_per_node, "--gpus-per-task": _gpus_per_node, "--gpus": _gpus_of_job,
    "--gres": _gpus_of_gres, "--tres-per-node": _gpus_of_gres, "--tres-per-task": _gpus_of_gres,
}


def _gpus(requested: Mapping[str, str], nodes: int, errors: list[ConfigError]) -> int:
    """Number of GPUs on a node that the options agree on; 0 without any. Adds to `errors`."""
    found: dict[str, int] = {}
    for option, value in requested.items():
        count = GPUS[option](value, nodes)
        if count is None:
            why = (f"it is the number of GPUs of all {nodes} nodes together, the same on each"
                   if option == "--gpus" and nodes > 1
                   else "the number of GPUs on a node, and so of ranks, cannot be read from it")
            errors.append(_wrong(f"{option}={value}", why, "--gpus-per-node=8, or --gpus-per-node=h100:8"))
        elif count:
            found[option] = count
    if len(set(found.values())) > 1:
        text = ", ".join(f"{option}={requested[option]} means {count}" for option, count in found.items())
        errors.append(_wrong("the options disagree about the GPUs of a node", text,
                             f"one of them, as --gpus-per-node={max(found.values())}"))
    return max(found.values(), default=0)


def _fits(value: str, number: bool) -> bool:
    if number:
        return value.isdigit() and int(value) > 0
    return bool(value) and not value.startswith("-") and "\n" not in value


def _expectation(option: str) -> tuple[str, str]:
    if option in _NUMBERS:
        return "it is a whole number from 1", f"{option} 2"
    return "it takes a value", f"{option} <value>"


def _wrong(what: str, why: str, next: str) -> ConfigError:
    return ConfigError(49, what, where="the command line", why=why, next=next)
