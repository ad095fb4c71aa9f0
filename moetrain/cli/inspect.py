"""moetrain inspect <run or checkpoint> [--tensors [pattern]]: show what a checkpoint holds.

<run> is a name or a directory, as it is or as run.name= or run.dir=; of a run the newest checkpoint is shown.
--tensors lists every tensor with its place; a pattern chooses some, as 'model.layers.0.*' or '*experts.7.*'.
Only the manifest is read; moetrain checkpoint verify reads the content.

A folder of another program is shown as well: of torch.distributed.checkpoint (DCP), or of safetensors files.
Its experts are listed by layer. Nothing that such a folder holds is run.
"""

from collections.abc import Iterator
from datetime import datetime
from fnmatch import fnmatch
from math import prod
from pathlib import Path
from typing import Any

from moetrain.checkpoint.manifest import NAME, read_manifest
from moetrain.checkpoint.records import ITEM_BYTES, Manifest, TensorEntry, split_expert
from moetrain.cli.table import table
from moetrain.config.run_names import reference
from moetrain.errors import ConfigError
from moetrain.interop.dcp.records import is_stored
from moetrain.runs.named_checkpoint import named_checkpoints
from moetrain.units import decimal

LARGEST = 5


def run(argv: list[str]) -> int:
    """Run the verb on the words that follow it; returns the exit code."""
    pattern = None
    if "--tensors" in argv:
        place = argv.index("--tensors")
        pattern, argv = (argv[place + 1:] or ["*"])[0], argv[:place] + argv[place + 2:]
    foreign = named_foreign(argv)
    if foreign is not None:
        from moetrain.cli import foreign_folder

        print("\n".join(foreign_folder.inspect(foreign, pattern)))
        return 0
    checkpoints = named(argv, "inspect")
    directory = checkpoints[-1]
    manifest = read_manifest(directory)
    lines = tensors(manifest, pattern) if pattern is not None else summary(directory, manifest, checkpoints)
    print("\n".join(lines))
    return 0


def named_foreign(argv: list[str]) -> Path | None:
    """Folder of another program that a command line names; None where it names something else."""
    path = Path(argv[0].removeprefix("run.dir=")) if len(argv) == 1 else None
    return path if path is not None and path.is_dir() and is_stored(path) else None


def named(argv: list[str], verb: str) -> list[Path]:
    """Find the checkpoints that a command line names, oldest first: all of a run, or one by its directory."""
    place = reference(argv[0]) if len(argv) == 1 else None
    if place is None:
        raise ConfigError(53, f"{verb} takes one run or one checkpoint", where="the command line",
                          why=f"it was given {' '.join(argv) or 'nothing'}",
                          next=f"moetrain {verb} <name or directory of a run, or directory of a checkpoint>")
    return named_checkpoints(place)


def summary(directory: Path, manifest: Manifest, checkpoints: list[Path]) -> Iterator[str]:
    """Yield step, author, model, mesh and data of a checkpoint, then tables of its sizes."""
    facts, values = manifest.facts, manifest.values
    yield f"{directory}"
    rows = [("step", f"{values['step']:,}   {values['tokens']:,} tokens"), ("written", written(facts)),
            ("model", model(manifest)), ("mesh", mesh(facts)),
            ("data", str(facts.get("data", "unknown"))[:16])]
    if len(checkpoints) > 1:
        steps = [int(path.name.removeprefix("step-")) for path in checkpoints[:-1]]
        rows.append(("others", ", ".join(map(str, steps))))
    yield from (f"  {label:8s} {text}" for label, text in rows)
    yield ""
    entries = {name: manifest.entry(name) for name in manifest.names()}
    kinds: dict[str, list[int]] = {name: [0, 0, 0] for name in sorted(set(map(kind, entries)))}
    for name, entry in entries.items():
        total = kinds[kind(name)]
        for index, amount in enumerate((1, prod(entry.shape), size(entry))):
            total[index] += amount
    kinds["all"] = [sum(column) for column in zip(*kinds.values())]
    yield from table([
        ["kind", "tensors", "values", "bytes"],
        *([name, f"{count:,}", f"{numbers:,}", decimal(amount, "B", 4)]
          for name, (count, numbers, amount) in kinds.items())])
    yield ""
    parts = manifest.parts()
    yield from table([
        ["file", "tensors", "bytes"],
        [NAME, "", decimal((directory / NAME).stat().st_size, "B", 4)],
        *([name, f"{len(parts[name]):,}", decimal(file.size, "B", 4)]
          for name, file in manifest.files.items())])
    yield ""
    largest = sorted(entries, key=lambda name: -size(entries[name]))[:LARGEST]
    yield from table([
        ["largest", "dtype", "shape", "bytes"],
        *([name, entries[name].dtype, shape(entries[name]), decimal(size(entries[name]), "B", 4)]
          for name in largest)])


def tensors(manifest: Manifest, pattern: str) -> Iterator[str]:
    """Yield a row for each chunk of the matching tensors: name, dtype, shape, rows, file, first byte."""
    rows = [["tensor", "dtype", "shape", "rows", "file", "begin"]]
    for name in sorted(manifest.names()):
        if fnmatch(name, pattern):
            entry = manifest.entry(name)
            rows += [[name, entry.dtype, shape(entry), f"{first}:{first + count}", file, f"{begin}"]
                     for file, begin, first, count, _ in entry.chunks]
    return table(rows)


def kind(name: str) -> str:
    """Classify a tensor by its name: `model, experts`, `optim exp_avg, dense`."""
    first, _, rest = name.partition(".")
    part = "experts" if split_expert(name) else "dense"
    return f"{first} {rest.rpartition('.')[2]}, {part}" if first == "optim" else f"{first}, {part}"


def written(facts: dict[str, Any]) -> str:
    """Say when and by which versions a checkpoint was written."""
    when, date = facts.get("time"), "at an unknown time"
    if isinstance(when, (int, float)):
        date = datetime.fromtimestamp(when).isoformat(" ", "seconds")
    return f"{date} by moetrain {facts.get('moetrain', '?')}, torch {facts.get('torch', '?')}"


def model(manifest: Manifest) -> str:
    """Describe the sizes of the model."""
    config = manifest.facts.get("config")
    sizes = config.get("model", {}) if isinstance(config, dict) else {}
    # By the tensors that are there, whatever key of whatever release made some layers dense.
    sparse = len({pattern.partition(".experts.")[0] for pattern in manifest.experts
                  if pattern.startswith("model.layers.")})
    beside = f" ({sparse} with experts)" if sparse != sizes.get("num_layers", sparse) else ""
    words = {"num_layers": f"layers{beside}", "dim": "wide", "num_experts": "experts", "top_k": "a token",
             "expert_dim": "wide each", "num_shared_experts": "shared"}
    if modules := sizes.get("mtp_layers"):
        words["mtp_layers"] = f"module{'s' * (modules > 1)} of multi-token prediction"
    return ", ".join(f"{sizes[key]} {word}" for key, word in words.items() if key in sizes) or "unknown"


def mesh(facts: dict[str, Any]) -> str:
    """List the axes longer than one, of both views of the ranks."""
    axes = facts["mesh"] if isinstance(facts.get("mesh"), dict) else {}
    long = [(axis, f"{axis} {count}") for axis, count in axes.items() if count != 1]
    views = {"dense": [text for axis, text in long if not axis.startswith("e")],
             "experts": [text for axis, text in long if axis.startswith("e")]}
    shown = [f"{view}: {' x '.join(texts)}" for view, texts in views.items() if texts]
    return "; ".join([f"{facts.get('ranks', '?')} ranks", *shown])


def size(entry: TensorEntry) -> int:
    """Return the bytes of a tensor."""
    return prod(entry.shape) * ITEM_BYTES[entry.dtype]


def shape(entry: TensorEntry) -> str:
    """Write the shape of a tensor."""
    return "[" + ", ".join(map(str, entry.shape)) + "]"
