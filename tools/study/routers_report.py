"""Results of tools/study/routers.py: figures of runs, table and picture."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tools.study.pairs import Difference, difference, smallest_seen

BASE = "topk"
LAST = 50                        # steps at the end over which loads are averaged


class Trained(NamedTuple):
    """A run that has finished.

    Args:
        arm: name of the arm.
        seed: run.seed.
        steps: optimizer steps.
        loss: held-out nats per byte, the mean over domains.
        active: routed experts that a token takes in a layer at the end, in all passes, mean over layers.
        violation: largest load over the mean load, less one, of the whole step, mean over routers.
        local_violation: the same inside micro-batches.
        information: nats, of expert and domain; 0 with one domain.
        step_s: median seconds of a step.
        memory: peak bytes of the process.
        parameters: all parameters of the model.
        experts: parameters of its experts.
        corpus: fingerprint of the prepared data.
        made_with: versions and commit.
    """

    arm: str
    seed: int
    steps: int
    loss: float
    active: float
    violation: float
    local_violation: float
    information: float
    step_s: float
    memory: int
    parameters: int
    experts: int
    corpus: str
    made_with: str


def read(directory: Path, job: Mapping[str, object], parameters: tuple[int, int], commit: str) -> Trained:
    """Read the figures of a run that has finished.

    Args:
        directory: its run directory.
        job: arm, seed and steps.
        parameters: of the model, and of its experts.
        commit: commit of the code.
    """
    environment = json.loads((directory / "env.json").read_text())
    steps = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    evaluation = json.loads((directory / "eval.jsonl").read_text().splitlines()[-1])
    last = steps[-LAST:]
    with np.load(directory / "loads.npz") as file:
        routers = file["routers"].tolist()
    passes = len(routers) / len({name.split(".")[1] for name in routers})
    return Trained(**job, loss=evaluation["nats_per_byte/mean"],
                   active=passes * float(np.mean([step["moe/active_experts"] for step in last])),
                   violation=float(np.mean([step["moe/max_violation/mean"] for step in last])),
                   local_violation=float(np.mean([step["moe/local_max_violation/mean"] for step in last])),
                   information=evaluation.get("moe/mutual_information/mean", 0.0),
                   step_s=float(np.median([step["time/step"] for step in steps[5:] or steps])),
                   memory=max(step["memory/peak"] for step in steps),
                   parameters=parameters[0], experts=parameters[1], corpus=environment["data"],
                   made_with=f"torch {environment['torch']}, commit {commit}")


# --- the page


def write_page(runs: Sequence[Trained], arms: Sequence[str], path: Path) -> None:
    """Write the page and its picture.

    Args:
        runs: all finished runs.
        arms: names of all arms, in their order.
        path: the page.
    """
    of = {arm: mine for arm in arms if (mine := [run for run in runs if run.arm == arm])}
    lines = ["# Routers and layer architectures beside each other", ""]
    if BASE in of:
        draw(of, path.with_suffix(".png"))
        lines += [f"![Loss and time of a step]({path.with_suffix('.png').name})", ""]
    made = "; ".join(sorted({run.made_with for run in runs})) or "nothing yet"
    steps = ", ".join(map(str, sorted({run.steps for run in runs}))) or "no"
    lines += ["`python -m tools.study.routers`; the tool's module docstring describes the runs and how "
              "parameters are kept equal. "
              f"{steps} steps, {len(runs)} runs, on CPU cores. Losses are held-out nats per byte, the mean "
              "over domains. Imbalance is the largest load of an expert over the mean load, less one, as a "
              f"mean over routers and the last {LAST} steps, of a step and inside micro-batches. "
              f"Made with {made}.", ""]
    lines += _sensitivity(of)
    lines += _table(of)
    missing = [arm for arm in arms if arm not in of]
    if missing:
        lines += ["", f"Not finished: {', '.join(missing)}."]
    path.write_text("\n".join(lines).rstrip() + "\n")


def paired(of: Mapping[str, Sequence[Trained]], arm: str,
           what: Callable[[Trained], float] = lambda run: run.loss) -> list[float]:
    """Differences of `what` between an arm and BASE, one for each seed of both."""
    base = {run.seed: what(run) for run in of.get(BASE, ())}
    return [what(run) - base[run.seed] for run in of[arm] if run.seed in base]


def _sensitivity(of: Mapping[str, Sequence[Trained]]) -> list[str]:
    """The smallest difference that the study can see, from the spreads of all arms that have pairs."""
    found = [apart for arm in of if arm != BASE and (apart := difference(paired(of, arm)))]
    if not found:
        return [f"Intervals need two seeds of an arm and of `{BASE}`.", ""]
    spread = float(np.sqrt(np.mean([apart.spread**2 for apart in found])))
    seeds = max(apart.seeds for apart in found)
    smallest = smallest_seen(spread, seeds)
    return [f"**Smallest difference that {seeds} seeds can see**: {smallest:.4f} nats per byte, two-sided "
            f"95 %, from the spread of all pairs (standard deviation {spread:.4f}). Intervals are those of "
            "one comparison, not corrected for their number.", ""]


def _table(of: Mapping[str, Sequence[Trained]]) -> list[str]:
    head = ["arm", "seeds", "parameters", "experts a token", "loss", f"against `{BASE}`", "step time",
            "imbalance, step", "imbalance, micro-batch", "information", "memory"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for arm, mine in of.items():
        apart = difference(paired(of, arm)) if arm != BASE else None
        ratio = _step_ratio(of, arm)
        cells = [arm, str(len(mine)), f"{mine[0].parameters / 1e6:.2f} M",
                 f"{np.mean([run.active for run in mine]):.2f}",
                 f"{np.mean([run.loss for run in mine]):.4f}", _shown(apart),
                 "" if ratio is None else f"{ratio:.2f}×",
                 *(f"{np.mean([what(run) for run in mine]):.2f}" for what in (
                     lambda run: run.violation, lambda run: run.local_violation)),
                 f"{np.mean([run.information for run in mine]):.3f}",
                 f"{np.mean([run.memory for run in mine]) / 1e6:.0f} MB"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _shown(apart: Difference | None) -> str:
    if apart is None:
        return ""
    seen = abs(apart.mean) > apart.half
    return f"{'**' * seen}{apart}{'**' * seen}"


def _step_ratio(of: Mapping[str, Sequence[Trained]], arm: str) -> float | None:
    """Median over seeds of the time of a step relative to BASE."""
    logs = paired(of, arm, lambda run: float(np.log(run.step_s)))
    return float(np.exp(np.median(logs))) if logs else None


def draw(of: Mapping[str, Sequence[Trained]], path: Path) -> None:
    """Draw what an arm costs and what it brings: loss against BASE over time of a step.

    Args:
        of: runs by arm.
        path: the picture.
    """
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    found = {arm: (ratio, values, difference(values)) for arm in of
             if (ratio := _step_ratio(of, arm)) is not None and (values := paired(of, arm))}
    order = sorted(found, key=lambda arm: np.mean(found[arm][1]), reverse=True)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 1.2 + 0.32 * len(order)), sharey=True,
                                         constrained_layout=True)
    for place, arm in enumerate(order):
        ratio, values, apart = found[arm]
        left.errorbar(np.mean(values), place, xerr=apart.half if apart else None, fmt="o", color="C0",
                      capsize=3)
        left.scatter(values, [place] * len(values), s=8, color="grey")
        right.barh(place, ratio, color="C1", height=0.6)
        right.text(ratio, place, f" {ratio:.2f}", va="center", fontsize=8)
    left.set_yticks(range(len(order)), order, fontsize=9)
    left.axvline(0, color="grey", lw=0.8)
    right.axvline(1, color="grey", lw=0.8)
    left.set(xlabel=f"held-out nats per byte, less `{BASE}` of the same seed",
             title="What it brings (left is better; bars: 95 %)")
    right.set(xlabel=f"time of a step, `{BASE}` = 1", title="What it costs")
    for axis in (left, right):
        axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
