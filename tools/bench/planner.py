"""Time of one layer's plan on one core: every planner, 64 to 16,384 positions, loads by expert and by node.

    python -m tools.bench.planner --out planner_speed.json
    python -m tools.bench.planner --write                     # also docs/results/planner_speed.md and .png

Loads are log-normal (sigma 1), of each node anew; nodes of 8 positions; equal blocks of homes, or where there
are fewer experts than positions, homes at even distances. The figures of the links are those of a GPU
cluster, so that copies pay and planners have work. A planner that took longer than `--limit` seconds is not
asked for larger sizes. The least of some repetitions is what it takes on a quiet machine; the median stands
beside it. `waterfill` splits the rows of a step over replicas: 64 experts over 8 positions on two nodes,
under the copies of `balanced`.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from moetrain.config.build import build
from moetrain.config.compose import compose
from moetrain.plan.cost.machine import Costs, Topology
from moetrain.plan.loads.synthetic import generate
from moetrain.plan.placement import LayerPlacement, contiguous
from moetrain.plan.planners.base import Planner
from moetrain.plan.splitting.split import waterfill

PLANNERS = ("ep", "hecate", "eplb", "shadow", "llep", "laer", "balanced")
POSITIONS = (64, 256, 1024, 4096, 16384)
PER_NODE, AIM_MS, WATERFILL_AIM_MS = 8, 10.0, 1.0
COSTS = Costs(row_s=1e-6, row_bytes=4096.0, expert_bytes=12e6, inside=200e9, between=40e9, latency_s=2e-5,
              hidden_s=5e-3)
ROOT = Path(__file__).parents[2]


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    planners = {name: build(compose([f"planner={name}", "parallel=fssdp"]).planner, "planner")
                for name in PLANNERS}
    rows = [row for form in ("by expert", "by node") for name, planner in planners.items()
            for row in growth(name, planner, form, options)]
    result = {"facts": facts(options), "options": vars(options), "plans": rows,
              "waterfill": split_times(options.repeats)}
    if options.out:
        Path(options.out).write_text(json.dumps(result, indent=1))
    print(table(rows), f"\nwaterfill: {result['waterfill']}")
    if options.write:
        page = Path(options.write)
        draw(rows, page.with_suffix(".png"))
        page.write_text(text(result))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--positions", type=int, nargs="+", default=list(POSITIONS))
    parser.add_argument("--max-copies", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--limit", type=float, default=3.0,
                        help="seconds of a plan beyond which larger sizes are left out")
    parser.add_argument("--out", help="where the result goes, .json")
    page = str(ROOT / "docs/results/planner_speed.md")
    parser.add_argument("--write", nargs="?", const=page, metavar="FILE.md",
                        help="also as a page with a picture beside it")
    return parser.parse_args()


def growth(name: str, planner: Planner, form: str, options: argparse.Namespace) -> list[dict]:
    """Times of one planner at growing sizes.

    Args:
        name: name of the planner.
        planner: the planner.
        form: loads `by expert` or `by node`.
        options: the options.
    """
    rows = []
    for positions in options.positions:
        topology = Topology(positions, PER_NODE)
        homes = LayerPlacement(contiguous(options.experts, positions).home, positions)
        draws = [loads_of(seed, topology, options.experts, form) for seed in range(3)]
        seconds = clock(
            lambda seed: planner.plan(draws[seed % 3], homes, topology, COSTS, options.max_copies), options)
        rows.append({"planner": name, "loads": form, "positions": positions, "least_ms": min(seconds) * 1e3,
                     "median_ms": statistics.median(seconds) * 1e3})
        if min(seconds) > options.limit:
            break
    return rows


def loads_of(seed: int, topology: Topology, experts: int, form: str) -> np.ndarray:
    """Random loads, int64: [nodes, experts] `by node`, else [experts]; 8,192 rows a position.

    Args:
        seed: seed of the draw.
        topology: positions and nodes.
        experts: number of experts.
        form: `by expert` or `by node`.
    """
    draw = np.random.default_rng(seed)
    popular_E = np.exp(draw.standard_normal(experts))
    taste_NE = popular_E * np.exp(0.3 * draw.standard_normal((topology.nodes, experts)))
    loads_NE = np.rint(taste_NE / taste_NE.sum(1, keepdims=True) * 8192 * PER_NODE).astype(np.int64)
    return loads_NE if form == "by node" else loads_NE.sum(0)


def clock(plan: Callable[[int], object], options: argparse.Namespace) -> list[float]:
    """Seconds of each repetition; fewer of slow planners, though a single slow one may be the machine's."""
    seconds, began = [], time.perf_counter()
    for seed in range(options.repeats + 1):
        begin = time.perf_counter()
        plan(seed)
        seconds.append(time.perf_counter() - begin)
        spent = time.perf_counter() - began
        if spent > options.limit and (len(seconds) > 3 or spent > 12 * options.limit):
            break
    return seconds[1:] or seconds


def split_times(repeats: int) -> dict[str, float]:
    """Least milliseconds of `waterfill` by case of the synthetic family."""
    topology, homes, found = Topology(8, 4), contiguous(64, 8), {}
    costs = Costs(row_s=1e-6, row_bytes=512.0, expert_bytes=1e5, inside=9e9, between=1e9, latency_s=1e-5,
                  hidden_s=1e-3)
    planner = build(compose(["planner=balanced", "parallel=fssdp"]).planner, "planner")
    for name in ("lognormal_1", "lognormal_1.5", "hot_expert", "hot_rank"):
        before_PE, n_PE = generate(name, 0, 2, 8, 64, 4096)
        placement = planner.plan(before_PE.sum(0), homes, topology, costs, 2).placement
        seconds = []
        for _ in range(4 * repeats):
            begin = time.perf_counter()
            waterfill(torch.from_numpy(n_PE), placement, topology, costs)
            seconds.append(time.perf_counter() - begin)
        found[name] = round(min(seconds) * 1e3, 2)
    return found


# --- the result


def facts(options: argparse.Namespace) -> dict[str, object]:
    """Machine, versions, commit and command of the measurement."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {"machine": f"{len(os.sched_getaffinity(0))} CPU cores ({platform.machine()}), one used",
            "load": os.getloadavg()[0],
            "numpy": np.__version__, "torch": torch.__version__, "commit": commit,
            "command": shlex.join(["python", "-m", "tools.bench.planner", *sys.argv[1:]])}


def table(rows: list[dict]) -> str:
    positions = sorted({row["positions"] for row in rows})
    found = {(row["planner"], row["loads"], row["positions"]):
             f"{row['least_ms']:.2f} ({row['median_ms']:.2f})" for row in rows}
    lines = [["planner", "loads", *(f"{size:,}" for size in positions)], ["---"] * (2 + len(positions))]
    for form in ("by expert", "by node"):
        lines += [[name, form, *(found.get((name, form, size), "-") for size in positions)]
                  for name in PLANNERS]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def text(result: dict) -> str:
    """The page of the results."""
    facts, options = result["facts"], result["options"]
    ours = {row["loads"]: row["least_ms"] for row in result["plans"]
            if row["planner"] == "balanced" and row["positions"] == 1024}
    split = ", ".join(f"{name} {ms:.2f}" for name, ms in result["waterfill"].items())
    return f"""# Planning time

Machine: {facts["machine"]}, load average {facts["load"]:.1f} at the end; numpy {facts["numpy"]}, torch \
{facts["torch"]}, commit {facts["commit"]}.

    {facts["command"]}

Milliseconds to plan one layer of {options["experts"]} experts with at most {options["max_copies"]} copies \
per position, nodes of {PER_NODE} and log-normal loads, by number of positions: the least of \
{options["repeats"]} repetitions, in brackets their median. `-`: not measured, because a smaller size took \
longer than {options["limit"]:g} s. All planners but `balanced` follow their authors' rules in plain Python \
and numpy.

{table(result["plans"])}

![Growth](planner_speed.png)

`balanced` at {options["experts"]} experts over 1,024 positions: {ours.get("by expert", float("nan")):.1f} \
ms with loads by expert, {ours.get("by node", float("nan")):.1f} ms by node (target: below {AIM_MS:.0f} ms).

`waterfill` (64 experts, 8 positions, two nodes), milliseconds: {split} (target: {WATERFILL_AIM_MS:.0f} ms).
"""


def draw(rows: list[dict], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, form in zip(figure.subplots(1, 2, sharey=True), ("by expert", "by node")):
        for name in PLANNERS:
            mine = [row for row in rows if row["planner"] == name and row["loads"] == form]
            axes.plot([row["positions"] for row in mine], [row["least_ms"] for row in mine], marker="o",
                      label=name, linewidth=2.4 if name == "balanced" else 1.2)
        axes.axhline(AIM_MS, color="0.6", linewidth=1, linestyle="--")
        axes.set(xscale="log", yscale="log", xlabel="positions", title=f"loads {form}")
        axes.set_xticks([row["positions"] for row in mine], labels=[f"{row['positions']:,}" for row in mine])
        axes.minorticks_off()
        axes.grid(color="0.92")
    figure.axes[0].set_ylabel("milliseconds a layer")
    figure.axes[1].legend(frameon=False, fontsize=8)
    figure.savefig(path)


if __name__ == "__main__":
    main()
