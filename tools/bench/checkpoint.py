"""Costs of checkpoints: how long training waits for a save, and what many experts cost beside their bytes.

    python -m tools.bench.checkpoint [--steps 200] [--write]

1. The quickstart's model on two ranks with a save every 50 steps, written while training goes on and waited
   for, in turn, in one run of this script: seconds that training waited, against the steps of the same run.
2. 60 layers of 256 experts, both matrices with both moments (92,160 tensors) of 16 numbers each, so that
   nothing but the bookkeeping is left: four ranks with expert parallelism, played one after another by this
   process.

Prints a page; --write puts it into docs/results/checkpoint.md.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import torch

from moetrain import __version__
from moetrain.checkpoint.commit import commit, write_rank
from moetrain.checkpoint.manifest import read_manifest
from moetrain.checkpoint.payload import TensorRows
from moetrain.checkpoint.verify import problems
from moetrain.comm.mesh import Group, Mesh
from moetrain.parallel.state_shards import DTYPE_NAMES, StateShard
from moetrain.train.checkpoint.layout import shards_to_write
from moetrain.train.checkpoint.load import CheckpointLoader
from moetrain.train.checkpoint.snapshot import as_bytes

ROOT = Path(__file__).parents[2]
LAYERS, EXPERTS, RANKS = 60, 256, 4
INTERVAL = 50
SAVED = r"\[save\] step (\d+): .* in ([\d.]+) s, training waited ([\d.]+) s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--write", action="store_true", help="write docs/results/checkpoint.md")
    options = parser.parse_args()
    stalls = {mode: stall(options.steps, mode) for mode in ("true", "false")}
    text = page(options.steps, stalls, bookkeeping())
    print(text)
    if options.write:
        (ROOT / "docs" / "results" / "checkpoint.md").write_text(text, encoding="utf-8")


def stall(steps: int, async_save: str) -> dict[str, float]:
    """Seconds of the quickstart's model: a step, a step during a save, the wait for a save, a whole save."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        command = ["train", "experiment=quickstart", "run.nproc=2", "parallel=ep", f"run.dir={run_dir}",
                   f"run.steps={steps}", f"checkpoint.interval={INTERVAL}",
                   f"checkpoint.async_save={async_save}", "log.interval=1000000", "log.wandb=off",
                   "eval.windows=1"]
        done = subprocess.run([sys.executable, "-m", "moetrain", *command], cwd=folder, text=True,
                              capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        if done.returncode:
            raise SystemExit(done.stderr)
        saves = [tuple(map(float, found)) for found in
                 re.findall(SAVED, done.stdout)]
        with (run_dir / "metrics.jsonl").open() as records:
            took = {record["step"]: record["time/step"] for record in map(json.loads, records)}
        size = sum(path.stat().st_size for path in max((run_dir / "checkpoints").iterdir()).iterdir())
    during = {step + after for step, _, _ in saves for after in (1, 2, 3)}
    middle = [save for save in saves if save[0] < steps]
    quiet = [seconds for step, seconds in took.items() if step > 10 and step not in during]
    return {"saves": len(middle), "bytes": size, "step": statistics.median(quiet),
            "during": statistics.median(took[step] for step in during if step in took),
            "wait": statistics.median(wait for _, _, wait in middle),
            "save": statistics.median(whole for _, whole, _ in middle)}


def bookkeeping() -> dict[str, float]:
    """Seconds and megabytes of saving and loading many small experts."""
    results: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        final = Path(folder) / "checkpoints/step-00000001"
        temporary = final.with_name("step-00000001.tmp-1")
        writing = []
        for mesh in meshes():
            shards = list(expert_shards(mesh))
            began = time.perf_counter()
            items = [TensorRows(p.name, DTYPE_NAMES[p.rows.dtype], p.shape, 0, len(p.rows), as_bytes(p.rows))
                     for p in shards_to_write(shards, mesh)]
            write_rank(temporary, mesh.rank, items, 1)
            writing.append(time.perf_counter() - began)
        results["write a rank"] = max(writing)
        began = time.perf_counter()
        commit(temporary, final, ranks=RANKS, facts={}, values={"step": 1, "tokens": 1})
        results["commit"] = time.perf_counter() - began
        results["manifest"] = (final / "manifest.json").stat().st_size / 1e6
        results["checkpoint"] = sum(path.stat().st_size for path in final.iterdir()) / 1e6
        began = time.perf_counter()
        results["tensors"] = len(list(read_manifest(final).names()))
        results["read the manifest"] = time.perf_counter() - began
        shards = list(expert_shards(meshes()[1]))
        loading = None
        for name, action in (("plan a load", lambda: CheckpointLoader(shards, final, "full")),
                             ("verify", lambda: loading.verify()), ("fill", lambda: loading.fill())):
            began = time.perf_counter()
            loading = action() or loading
            results[name] = time.perf_counter() - began
        began = time.perf_counter()
        assert next(problems(final), None) is None
        results["verify all"] = time.perf_counter() - began
    return results


def meshes() -> list[Mesh]:
    """Meshes of the ranks, as this process plays them."""
    return [Mesh({"ep": RANKS}, rank, torch.device("cpu"), {"expert_grad": Group("expert_grad", (rank,), 0)})
            for rank in range(RANKS)]


def expert_shards(mesh: Mesh) -> Iterator[StateShard]:
    """State that expert parallelism over four ranks leaves on one."""
    own = range(mesh.rank * EXPERTS // RANKS, (mesh.rank + 1) * EXPERTS // RANKS)
    for layer in range(LAYERS):
        for matrix in ("gate_up", "down"):
            for expert in own:
                name = f"layers.{layer}.moe.experts.{expert}.{matrix}"
                for full in (f"model.{name}", f"optim.{name}.exp_avg", f"optim.{name}.exp_avg_sq"):
                    yield StateShard(full, (4, 4), 0, torch.full((4, 4), float(expert)), "expert_grad")


def page(steps: int, runs: dict[str, dict[str, float]], many: dict[str, float]) -> str:
    """The page, as Markdown.

    Args:
        steps: steps of the two runs.
        runs: what `stall` found, by checkpoint.async_save.
        many: what `bookkeeping` found.
    """
    git = ["git", "rev-parse", "--short", "HEAD"]
    head = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    background, waited = runs["true"], runs["false"]
    load, size = os.getloadavg()[1], background["bytes"] / 1e6
    return f"""# Time of saves and loads

`python -m tools.bench.checkpoint --steps {steps} --write`, {date.today():%d %B %Y}, commit {head}; moetrain
{__version__}, torch {torch.__version__}, Python {platform.python_version()}; 2 CPU cores, AVX-512, load
average {load:.1f} over the last five minutes. Other programs ran at the same time, so compare ratios within a
column only.

## How long training waits

The quickstart's model trains on two ranks (expert parallelism), with {INTERVAL} steps between saves and
{size:.0f} MB per checkpoint. Numbers are medians over {background["saves"]:.0f} saves, without the one at the
end. The columns are two runs, one after the other. Waits are recorded to 0.01 s.

| seconds | `async_save=true` | `async_save=false` |
|---|---|---|
| a step with no save under way | {background["step"]:.3f} | {waited["step"]:.3f} |
| one of the three steps after a save began | {background["during"]:.3f} | {waited["during"]:.3f} |
| training waits for a save | {background["wait"]:.2f} | {waited["wait"]:.2f} |
| wait over a step | {background["wait"] / background["step"]:.2f} | {waited["wait"] / waited["step"]:.2f} |
| from the start of a save until all ranks know that it is complete | {background["save"]:.2f} \
| {waited["save"]:.2f} |

## What many experts cost

{LAYERS} layers of {EXPERTS} experts with two matrices and two moments each give {many["tensors"]:,} tensors
of 16 numbers. One process plays {RANKS} ranks of expert parallelism, one after another. The checkpoint has
{many["checkpoint"]:.1f} MB, of which {many["manifest"]:.2f} MB are the manifest.

| | s |
|---|---|
| a rank: layout, payload with checksums, index, two fsyncs | {many["write a rank"]:.2f} |
| rank 0: merge the indexes, write and check the manifest, rename | {many["commit"]:.2f} |
| read and check the manifest | {many["read the manifest"]:.2f} |
| a rank: read the manifest and plan what to read | {many["plan a load"]:.2f} |
| a rank: compare what it will read with its checksums | {many["verify"]:.2f} |
| a rank: read it into the state | {many["fill"]:.2f} |
| `moetrain checkpoint verify` of everything | {many["verify all"]:.2f} |

For comparison, in an earlier trial torch's `dcp.save` and `dcp.load` took 25 s and 29 s for 138,240 such
chunks on four ranks of a similar machine, mostly for the exchange of plans, with a manifest of 6 MB.
"""


if __name__ == "__main__":
    main()
