"""Speed and memory of import and export, beside the machine's own copy of the same folder.

    python -m tools.bench.convert [--gigabytes 2] [--dtype BF16] [--rounds 3] [--folder /tmp] [--write]

A Mixtral of that size is made here, with random numbers and one name per expert. Each round then copies its
folder (shutil.copyfile and fsync), imports it, copies the folder again, and exports the run, each in a
process of its own, so that peaks of memory are theirs. The rates:

    folder      bytes of the folder over seconds
    moved       half of all bytes read and written over seconds; for a copy that is the same

An import stores float32, so that from a folder in bfloat16 it writes twice what it reads. Peaks are those of
resident memory above that before the work began, over the bytes of the largest layer: embedding, head, or a
block, in the wider of its two dtypes.

Prints a page; --write puts it into docs/results/convert.md.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from datetime import date
from math import prod
from pathlib import Path
from typing import Any

import torch

from moetrain import __version__
from moetrain.checkpoint.records import ITEM_BYTES
from moetrain.config.compose import compose
from moetrain.config.schema import Config
from moetrain.interop.huggingface.exporting import export_weights
from moetrain.interop.huggingface.families import FAMILIES
from moetrain.interop.huggingface.folder import CONFIG, open_folder
from moetrain.interop.huggingface.folder_writer import FolderWriter
from moetrain.interop.huggingface.importing import import_folder
from moetrain.model.build import weights_on_meta
from moetrain.parallel.state_shards import DTYPES
from moetrain.transform.reader import open_weights

ROOT = Path(__file__).parents[2]
SIZES: dict[str, Any] = {
    "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 3584,
    "num_attention_heads": 16, "num_key_value_heads": 4, "num_local_experts": 8, "num_experts_per_tok": 2,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "hidden_act": "silu"}
FAMILY = FAMILIES["mixtral"]
WORK = ("copy", "import", "export")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--dtype", choices=("BF16", "F32"), default="BF16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work: its disk is measured")
    parser.add_argument("--write", action="store_true", help="write docs/results/convert.md")
    parser.add_argument("--alone", nargs=4, metavar=("WORK", "FROM", "TO", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(measured(*options.alone)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        text = page(options, *measure(Path(folder), options.gigabytes, options.dtype, options.rounds))
    print(text)
    if options.write:
        (ROOT / "docs" / "results" / "convert.md").write_text(text, encoding="utf-8")


def measure(folder: Path, gigabytes: float, dtype: str,
            rounds: int) -> tuple[dict[str, int], list[dict[str, dict[str, float]]]]:
    """Make the checkpoint, and do everything in turn.

    Args:
        folder: where to work.
        gigabytes: size of the folder of the model.
        dtype: of its tensors.
        rounds: of copy, import, copy, export.

    Returns:
        Sizes of folder, run and largest layer in bytes, and what each round took.
    """
    model, sizes = folder / "model", make(folder / "model", gigabytes, dtype)
    found = []
    for _ in range(rounds):
        took = {"copy": alone("copy", model, folder / "copied", dtype)}
        took["import"] = alone("import", model, folder / "run", dtype)
        shutil.rmtree(folder / "copied")
        took["copy again"] = alone("copy", model, folder / "copied", dtype)
        took["export"] = alone("export", folder / "run", folder / "exported", dtype)
        sizes["run"] = size_of(folder / "run")
        for name in ("copied", "run", "exported"):
            shutil.rmtree(folder / name)
        found.append(took)
    return sizes, found


def make(out: Path, gigabytes: float, dtype: str) -> dict[str, int]:
    """Write the folder of a Mixtral of about this size; returns its bytes and those of its largest layer."""
    one, two = (counted({**SIZES, "num_hidden_layers": layers}) for layers in (1, 2))
    per_layer = sum(two.values()) - sum(one.values())
    rest = sum(one.values()) - per_layer
    layers = max(1, round((gigabytes * 1e9 / ITEM_BYTES[dtype] - rest) / per_layer))
    theirs = {**SIZES, "num_hidden_layers": layers}
    config = config_of(theirs)
    rows = SIZES["vocab_size"]
    shapes = {name: tuple(shard.shape) for name, shard in weights_on_meta(config, rows).items()}
    kinds = {name: (dtype, shape) for layer in FAMILY.tensor_maps(config, rows, None)
             for group in layer for name, shape in group.shapes_of_theirs(shapes).items()}
    draw = torch.Generator().manual_seed(0)
    with FolderWriter(out, shard_bytes=10**9) as writer:
        writer.begin_shards(kinds)
        for name, (_, shape) in kinds.items():
            writer.add(name, torch.randn(shape, generator=draw, dtype=torch.float32))
        writer.end_shards()
        writer.write(CONFIG, json.dumps(theirs))
    return {"folder": size_of(out), "layers": layers, "largest": 4 * max(counted(theirs).values())}


def counted(theirs: dict[str, Any]) -> Counter[str]:
    """Numbers in each layer."""
    found = Counter[str]()
    for name, shard in weights_on_meta(config_of(theirs), theirs["vocab_size"]).items():
        found[".".join(name.split(".")[:3])] += prod(shard.shape)
    return found


def config_of(theirs: dict[str, Any]) -> Config:
    """Config of a run that holds the model."""
    bare = FAMILY.bare_config(theirs)
    return replace(compose(["data=synthetic"]), model=bare.model, router=bare.router, expert=bare.expert)


def alone(work: str, source: Path, out: Path, dtype: str) -> dict[str, float]:
    """Do a piece of work in a process of its own."""
    command = [sys.executable, "-m", "tools.bench.convert", "--alone", work, str(source), str(out), dtype]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(work: str, source: str, out: str, dtype: str) -> dict[str, float]:
    """Do a piece of work in this process; returns seconds, and the bytes of memory that it has taken."""
    Path("/proc/self/clear_refs").write_text("5")             # the peak begins anew
    before, began, busy = memory("VmRSS"), time.perf_counter(), time.process_time()
    if work == "copy":
        copy(Path(source), Path(out))
    elif work == "import":
        with open_folder(source) as folder:
            import_folder(folder, out, family=FAMILY, config=config_of(folder.config))
    else:
        with open_weights(source) as reader, FolderWriter(out, shard_bytes=10**9) as writer:
            export_weights(reader, FAMILY, writer, dtype=DTYPES[dtype])
    return {"seconds": time.perf_counter() - began, "cpu": time.process_time() - busy,
            "memory": memory("VmHWM") - before}


def copy(source: Path, out: Path) -> None:
    """Copy the files of a folder, and bring them to the disk."""
    out.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, out / path.name)
        with (out / path.name).open("rb+") as file:
            os.fsync(file.fileno())


def memory(what: str) -> int:
    """Resident memory of this process in bytes: VmRSS now, VmHWM its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def page(options: argparse.Namespace, sizes: dict[str, int],
         rounds: list[dict[str, dict[str, float]]]) -> str:
    """The page, as Markdown."""
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True,
                          text=True).stdout.strip()
    moved, lines = (sizes["folder"] + sizes["run"]) / 2, []
    for work, beside in (("import", "copy"), ("export", "copy again")):
        took = [entry[work]["seconds"] for entry in rounds]
        copied = [entry[beside]["seconds"] for entry in rounds]
        of_folder = [second / first for first, second in zip(took, copied)]
        of_moved = [ratio * moved / sizes["folder"] for ratio in of_folder]
        memory = max(entry[work]["memory"] for entry in rounds)
        busy = [statistics.median(entry[name]["cpu"] for entry in rounds) for name in (work, beside)]
        rate, copy_rate = (sizes["folder"] / 1e6 / statistics.median(times) for times in (took, copied))
        lines.append(
            f"| {work} | {statistics.median(took):.1f} | {busy[0]:.1f} | {rate:.0f} | {copy_rate:.0f}"
            f" | {busy[1]:.1f}"
            f" | {spread(of_folder)} | {spread(of_moved)}"
            f" | {memory / 1e6:.0f} | {memory / sizes['largest']:.2f} |")
    rows = "\n".join(lines)
    return f"""# Time and memory of import and export

`python -m tools.bench.convert --gigabytes {options.gigabytes:g} --dtype {options.dtype} \
--rounds {options.rounds} --write`, {date.today():%d %B %Y}, commit {head}; moetrain {__version__},
torch {torch.__version__}, Python {platform.python_version()}; {os.cpu_count()} CPU cores, load average
{os.getloadavg()[1]:.1f} over the last five minutes. Other programs ran at the same time, so compare ratios
only: each import and export is measured beside a copy of the same folder, in turn.

A Mixtral of {sizes["layers"]} layers, {sizes["folder"] / 1e9:.2f} GB in {options.dtype}; as a run, in
float32, {sizes["run"] / 1e9:.2f} GB. Its largest layer has {sizes["largest"] / 1e6:.0f} MB in float32.

| | s | CPU s | MB/s of the folder | copy, MB/s | copy, CPU s | over the copy, by the folder \
| over the copy, by bytes moved | memory, MB | over the largest layer |
|---|---|---|---|---|---|---|---|---|---|
{rows}

Ratios of rates are medians over the rounds, with the least and the largest. Bytes moved are half of those
read and written: an import from bfloat16 writes twice what it reads, and an export reads twice what it
writes. Memory is the peak above that before the work began.
"""


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
