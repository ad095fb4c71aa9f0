"""Step time of every planner on given loads, over emulated links, and the copies that it makes.

    python -m tools.bench.placement --loads runs/mine/loads.npz --out placement.json
    python -m tools.bench.placement --loads synthetic a/loads.npz --oracle --out placement.json --write

A trace is the rows of every source rank for every expert, step by step: of a loads.npz recorded with
log.sources=true, or its totals dealt out evenly; or the seeded family of plan/loads/synthetic.py. Every rank
replays them through the real dispatcher, copies and collectives, forward and backward, over two layers, in
its own emulated network (tools/netlab/lab.py). Computing is paced (tools/bench/placement_ranks.py); a few
unpaced steps stand beside it. What each rank hands to its collectives is counted at every step, and must be
what follows from rows, plan and sizes.

Planners get the same forecasts (mean of the last steps), limits on copies and figures of the links, and take
turns at every step. Two lines of reference: `ep`, and the *ceiling*: what force-balanced routing takes in the
same set-up. `recovered` is the share of the time between them that a planner wins back. Results are medians
of the ratios to `ep` at the same steps, with an interval by resampling steps.

Settings are fixed on `--seeds tuning` and other recordings, and judged on `--seeds judged` (the default).
Needs what netlab needs.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from moetrain.plan.loads.synthetic import NAMES, generate
from tools.bench.placement_ranks import WINDOW, work
from tools.bench.placement_report import table, write
from tools.netlab import lab as netlab
from tools.netlab.measure import measure
from tools.netlab.rank import connected

PLANNERS = ("ep", "hecate", "eplb", "shadow", "llep", "laer", "balanced")
SEEDS = {"tuning": (0, 1, 2, 3), "judged": (101, 102, 103, 104)}
ROOT = Path(__file__).parents[2]
WAIT_S = 600                   # of a rank for another, which may be planning


def main() -> None:
    options = parse()
    if options.worker:
        with connected(WAIT_S):
            work(options, Path(options.worker))
        return
    if options.join:
        finish(joined([json.loads(Path(file).read_text()) for file in options.join]), options)
        return
    traces = dict(read_traces(options))
    if not traces:
        raise SystemExit("no trace has such a name")
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    spec = out.with_suffix(".traces.npz")
    np.savez(spec, **traces)
    busy = [os.getloadavg()[0]]
    with netlab.Lab(nodes=options.nodes, per_node=options.per_node, inside=options.inside,
                    between=options.between) as lab:
        links = measure(lab) if options.measure or options.write is not None else []
        before = sent_by_all(lab)
        command = [sys.executable, "-m", "tools.bench.placement", *sys.argv[1:],
                   "--planners", *arms(options), "--worker", str(spec)]
        code = lab.run(command)
        carried = {link: number - before[link] for link, number in sent_by_all(lab).items()}
    spec.unlink()
    if code:
        sys.exit(code)
    load = [round(value, 2) for value in (*busy, os.getloadavg()[0])]
    result = {"facts": {**facts(), "load average": load},
              "options": {key: value for key, value in vars(options).items() if key != "worker"},
              "links": links, "wire_bytes": carried, **json.loads(out.read_text())}
    result["options"]["planners"] = arms(options)
    finish(result, options)


def sent_by_all(lab: netlab.Lab) -> dict[str, int]:
    """Bytes that all ranks have put on each kind of link so far."""
    return {link: sum(lab.sent(rank)[link] for rank in range(lab.world)) for link in netlab.LINKS}


def joined(results: list[dict]) -> dict:
    """Join the results of several runs on other traces; all must have been measured alike."""
    first = results[0]
    alike = ("planners", "nodes", "per_node", "inside", "between", "dim", "expert_dim", "rows", "row_us",
             "hidden_ms", "max_copies", "steps", "real_steps")
    for other in results[1:]:
        differ = [key for key in alike if other["options"][key] != first["options"][key]]
        if differ:
            raise SystemExit(f"these results were not measured alike: {', '.join(differ)}")
    loads = [value for result in results for value in result["facts"]["load average"]]
    commits = ", ".join(dict.fromkeys(result["facts"]["commit"] for result in results))
    facts = {**first["facts"], "commit": commits, "load average": [min(loads), max(loads)],
             "command": "\n    ".join(result["facts"]["command"] for result in results)}
    return {**first, "facts": facts,
            "links": next((result["links"] for result in results if result["links"]), []),
            "wire_bytes": {link: sum(result["wire_bytes"][link] for result in results)
                           for link in netlab.LINKS},
            "handed_over_bytes": sum(result["handed_over_bytes"] for result in results),
            "traces": {name: trace for result in results for name, trace in result["traces"].items()}}


def finish(result: dict, options: argparse.Namespace) -> None:
    """Write the result as JSON, print its table, and write its page where one is asked for."""
    Path(options.out).write_text(json.dumps(result, indent=1))
    print(table(result))
    if options.write is not None:
        write(result, Path(options.write or page_of(result["options"])))


def page_of(options: dict) -> Path:
    """Page of the results; every mesh has its own."""
    mesh = f"{options['nodes']}x{options['per_node']}"
    return ROOT / "docs/results" / ("placement.md" if mesh == "2x2" else f"placement_{mesh}.md")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loads", nargs="+", default=[], metavar="FILE",
                        help="loads.npz of runs, or `synthetic`")
    parser.add_argument("--join", nargs="+", metavar="OUT.json",
                        help="instead of measuring: results of earlier runs, as one")
    parser.add_argument("--out", required=True, help="where the result goes, .json")
    parser.add_argument("--write", nargs="?", const="", metavar="FILE.md",
                        help="also as a page and a picture beside it (docs/results/placement.md, or "
                             "placement_<nodes>x<per node>.md); measures the links first")
    parser.add_argument("--measure", action="store_true",
                        help="measure the links first, and what moving bytes costs the cores")
    parser.add_argument("--planners", nargs="+", default=list(PLANNERS),
                        help="name[+oracle][+nodes]; see Arm")
    parser.add_argument("--oracle", nargs="*", metavar="PLANNER",
                        help="one column more for each of these (balanced): told the "
                        "loads of the step itself")
    parser.add_argument("--traces", nargs="+", help="only those whose name contains one of these")
    parser.add_argument("--seeds", choices=SEEDS, default="judged", help="of the synthetic family")
    parser.add_argument("--many", type=int, default=1, help="seeds of each synthetic case")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--per-node", type=int, default=2)
    parser.add_argument("--inside", default="900mbit", help="link of a rank to others of its node")
    parser.add_argument("--between", default="100mbit", help="link of a rank to other nodes")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--expert-dim", type=int, default=32)
    parser.add_argument("--experts", type=int, default=16, help="synthetic: experts of a layer")
    parser.add_argument("--rows", type=int, default=256, help="rows of a rank and layer, on average")
    parser.add_argument("--row-us", type=float, default=200.0,
                        help="computing a row, forward and backward, in microseconds")
    parser.add_argument("--hidden-ms", type=float, default=20.0,
                        help="attention before a layer, forward; backward twice that")
    parser.add_argument("--max-copies", type=int, default=2)
    parser.add_argument("--first", type=int, default=-1,
                        help="recorded: the first step measured; -1: the last ones")
    parser.add_argument("--steps", type=int, default=12, help="measured steps of a trace")
    parser.add_argument("--real-steps", type=int, default=4, help="unpaced steps of a trace; 0: none")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if "ep" not in options.planners:
        parser.error("--planners needs ep: it is what the others are measured against")
    return options


def arms(options: argparse.Namespace) -> list[str]:
    """Names of the planners, and of those that are told the loads of the step itself."""
    told = options.oracle if options.oracle else ["balanced"] if options.oracle is not None else []
    return list(dict.fromkeys([*options.planners, *(f"{planner}+oracle" for planner in told)]))


def facts() -> dict[str, object]:
    """Machine, versions, commit and command of the measurement."""
    git = ["git", "-C", str(ROOT)]
    commit = _output([*git, "rev-parse", "--short", "HEAD"])
    changed = _output([*git, "status", "--porcelain", "--untracked-files=no"])
    return {"machine": f"{len(os.sched_getaffinity(0))} CPU cores ({platform.machine()})",
            "torch": torch.__version__, "commit": commit + (" with changes" if changed else ""),
            "command": shlex.join(["python", "-m", "tools.bench.placement", *sys.argv[1:]])}


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


# --- traces


def read_traces(options: argparse.Namespace) -> Iterator[tuple[str, np.ndarray]]:
    """Traces by name, int64 [WINDOW + 1 + steps, positions, experts], scaled to `options.rows`."""
    positions, length = options.nodes * options.per_node, WINDOW + 1 + options.steps
    for source in options.loads:
        if source == "synthetic":
            found = family(options, positions, length)
        else:
            found = recorded(source, positions, length, options.first)
        for name, trace in found:
            if not options.traces or any(part in name for part in options.traces):
                yield name, scaled(trace, options.rows)


def family(options: argparse.Namespace, positions: int, length: int) -> Iterator[tuple[str, np.ndarray]]:
    """Traces of the synthetic family, by case and seed."""
    for name in NAMES:
        for seed in SEEDS[options.seeds][:options.many]:
            yield f"{name} #{seed}", generate(name, seed, length, positions, options.experts, rows=4096)


def recorded(source: str, positions: int, length: int, first: int) -> Iterator[tuple[str, np.ndarray]]:
    """Traces of a run by router, named by its folder.

    Args:
        source: a loads.npz.
        positions: number of positions.
        length: number of steps.
        first: first measured step; -1: the last ones.
    """
    with np.load(source) as file:
        steps = len(file["loads"])
        begin = max(0, steps - length if first < 0 else first - WINDOW - 1)
        names, sizes = file["routers"].tolist(), file["experts"].tolist()
        for index, (name, size) in enumerate(zip(names, sizes, strict=True)):
            name = f"{_run_of(source)} {name.removesuffix('.moe')}"
            if "sources" in file and file["sources"].shape[2] % positions == 0:
                by_rank = file["sources"][begin:begin + length, index, :, :size]
                yield name, by_rank.reshape(len(by_rank), positions, -1, size).sum(2)
            else:
                totals = file["loads"][begin:begin + length, index, :size]
                shares = [(totals + (positions - 1 - p)) // positions for p in range(positions)]
                yield f"{name} (sources alike)", np.stack(shares, axis=1)


def _run_of(source: str) -> str:
    """Name of a run: runs/mine/loads.npz -> mine; traces/mine.npz -> mine."""
    path = Path(source)
    return path.resolve().parent.name if path.stem == "loads" else path.stem


def scaled(trace: np.ndarray, rows: int) -> np.ndarray:
    """Scale a trace to `rows` rows a position and step on average, in the same proportions."""
    mean = trace.sum((1, 2), keepdims=True) / trace.shape[1]
    return np.rint(trace * (rows / mean)).astype(np.int64)


if __name__ == "__main__":
    main()
