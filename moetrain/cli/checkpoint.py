"""moetrain checkpoint verify|resize <run or checkpoint>: check every byte of checkpoints, or change experts.

<run> is a name or a directory, as it is or as run.name= or run.dir=.

moetrain checkpoint verify <run> compares every byte with its checksum. It prints one line a checkpoint; the
exit code is 13 when one of them is damaged. Experts that are equal or zero are named.

moetrain checkpoint verify <folder> checks a folder of another program: of torch.distributed.checkpoint (DCP),
or of safetensors files. It says whether every expert of every layer is there, is a number, and differs from
the others; the exit code is 13 when one is not. Nothing that the folder holds is run.

moetrain checkpoint resize <run> to=<name> keep=[0,2,5] add=2 writes a run with other experts in every layer,
and changes nothing of its source. keep names those that stay, in their new order; keep=4 keeps the four that
the last evaluation of the run used most, or with domain=... those that this domain used most. add is the
number of new ones behind them, and router.num_groups=... an argument of the router that has to follow.
moetrain train <name> then goes on at the same step.
"""

import time
from pathlib import Path
from typing import Any

from moetrain.checkpoint.verify import problems
from moetrain.cli.inspect import named, named_foreign
from moetrain.cli.progress import byte_progress
from moetrain.config.suggest import nearest
from moetrain.errors import CheckpointError, ConfigError
from moetrain.units import decimal

_RESIZE_KEYS = ("to", "keep", "add", "domain")
_SUBCOMMANDS = ("verify", "resize")


def run(argv: list[str]) -> int:
    """Run the verb on the words that follow it; returns the exit code."""
    if not argv or argv[0] not in _SUBCOMMANDS:
        given = argv[0] if argv else ""
        near = nearest(given, _SUBCOMMANDS) or list(_SUBCOMMANDS)
        raise ConfigError(
            42, f"there is no verb checkpoint {given}".rstrip(), where="the command line",
            why=f"checkpoint can {', '.join(_SUBCOMMANDS)}",
            next=f"moetrain checkpoint {near[0]} <run>")
    if argv[0] == "resize":
        return resize(argv[1:])
    foreign = named_foreign(argv[1:])
    return verify(named(argv[1:], "checkpoint verify")) if foreign is None else verify_foreign(foreign)


def verify_foreign(directory: Path) -> int:
    """Check a folder of another program, and whether every expert is there and differs from the others."""
    from moetrain.cli import foreign_folder

    with byte_progress() as progress:
        foreign_folder.verify(directory, progress(2 * _bytes_in(directory)))
    return 0


def verify(checkpoints: list[Path]) -> int:
    """Read all checkpoints, then raise CheckpointError with every damaged file."""
    from moetrain.cli.foreign_folder import verify_own

    harm: list[CheckpointError] = []
    damaged = 0
    sizes = {directory: _bytes_in(directory) for directory in checkpoints}
    with byte_progress() as progress:
        advance = progress(sum(sizes.values()))
        for directory, size in sizes.items():
            began = time.perf_counter()
            found = list(problems(directory, advance))
            damaged += bool(found)
            harm += found
            seconds = time.perf_counter() - began
            word = "damaged" if found else "good"
            print(f"{word:8s} {directory}   {decimal(size, 'B', 4)} in {seconds:.1f} s")
            for error in found:
                print(f"         {Path(error.where).name}: {error.why}")
            if not found:
                harm += verify_own(directory, advance)
    if harm:
        raise CheckpointError(
            5, f"{damaged} of {len(checkpoints)} checkpoints {'is' if damaged == 1 else 'are'} damaged",
            where=", ".join(error.where for error in harm),
            why="the lines above say what is wrong with each file",
            next="restore the files; training passes over a damaged checkpoint and goes on from an older "
                 "one")
    return 0


def resize(argv: list[str]) -> int:
    """Write a run with other experts (transform/resize.py)."""
    keys = {key: value for key, given, value in (word.partition("=") for word in argv)
            if given and (key in _RESIZE_KEYS or key.startswith("router."))}
    rest = [word for word in argv if word.partition("=")[0] not in keys]
    checkpoint = named(rest, "checkpoint resize")[-1]
    keep, add = _number_or_ids(keys.get("keep")), _number_or_ids(keys.get("add", "0"))
    if not keys.get("to") or not isinstance(add, int):
        raise ConfigError(
            280, "the new run has no name" if isinstance(add, int) else f"add={keys['add']} is no number",
            where="the command line", why="resize writes another run and changes nothing of this one",
            next="moetrain checkpoint resize <run> to=<name of the new run> keep=[0,1,2] add=1")
    import yaml

    from moetrain.transform.resize import resize_experts

    router = {key.removeprefix("router."): yaml.safe_load(value) for key, value in keys.items()
              if key.startswith("router.")}

    usage = _usage(checkpoint, keys.get("domain")) if isinstance(keep, int) else None
    target = Path(keys["to"]) if "/" in keys["to"] else Path("runs") / keys["to"]
    print(resize_experts(checkpoint, target, keep=keep, add=add, usage=usage, router=router))
    print(f"go on with: moetrain train {keys['to']}")
    return 0


def _number_or_ids(text: str | None) -> int | list[int] | None:
    """Read a number, or ids in brackets."""
    if text is None:
        return None
    try:
        ids = [int(part) for part in text.strip("[]").split(",") if part.strip()]
    except ValueError:
        ids = []
    if not ids or not text.startswith("[") and len(ids) > 1:
        raise ConfigError(280, f"{text} is neither a number nor a list of ids", where="the command line",
                          why="keep is a number of experts, or the ids of those that stay; add is a number",
                          next="keep=4, or keep=[0,2,5]")
    return ids if text.startswith("[") else ids[0]


def _usage(checkpoint: Path, domain: str | None) -> dict[str, Any]:
    """Tokens that chose each expert in the last evaluation of a run, of one domain or of all."""
    from moetrain.report.specialization import read_specialization

    path = checkpoint.parents[1] / "specialisation.npz"
    if not path.exists():
        return {}
    found = read_specialization(path)
    if domain is not None and domain not in found.domains:
        raise ConfigError(281, f"there is no domain {domain}", where="domain",
                          why=f"the last evaluation had {', '.join(found.domains)}",
                          next=f"domain={(nearest(domain, found.domains) or found.domains)[0]}")
    rows = slice(None) if domain is None else [found.domains.index(domain)]
    return {name: choices_ME[rows].sum(0) for name, choices_ME in found.choices.items()}


def _bytes_in(directory: Path) -> int:
    return sum(path.lstat().st_size for path in directory.iterdir()) if directory.is_dir() else 0
