"""Results of tools/study/balance.py: figures of runs, weights of equal balance, differences, page."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moetrain.runs.specialization import mutual_information
from tools.study.pairs import Difference, difference, smallest_seen

# Columns of both stages, and their digits.
FIGURES = (("violation", 2), ("local_violation", 2), ("information", 3))
LAST = 50                        # steps at the end over which violations are averaged


class Arm(NamedTuple):
    """One way to balance: a key that sets its strength, the strengths of stage 1, and its overrides."""

    key: str
    strengths: tuple[float, ...]
    overrides: tuple[str, ...]


class Trained(NamedTuple):
    """A run that has finished.

    Args:
        stage: 1 or 2.
        arm: name of the arm.
        strength: value of the arm's key.
        seed: run.seed.
        losses: held-out nats per byte by domain, and their mean.
        violation: max load over mean, less one, of the whole step, mean over routers.
        local_violation: the same inside micro-batches of a rank.
        information: nats, of expert and domain.
        step_s: median seconds of a step.
        corpus: fingerprint of the prepared data.
        made_with: versions and commit.
    """

    stage: int
    arm: str
    strength: float
    seed: int
    losses: dict[str, float]
    violation: float
    local_violation: float
    information: float
    step_s: float
    corpus: str
    made_with: str


def read(directory: Path, job: Mapping[str, object], commit: str) -> Trained:
    """Read the figures of a run that has finished.

    Args:
        directory: its run directory.
        job: stage, arm, strength and seed.
        commit: commit of the code.
    """
    environment = json.loads((directory / "env.json").read_text())
    steps = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    evaluation = json.loads((directory / "eval.jsonl").read_text().splitlines()[-1])
    last = steps[-LAST:]
    with np.load(directory / "specialisation.npz") as file:
        information = [mutual_information(file["choices"][:, router, :experts])
                       for router, experts in enumerate(file["experts"])]
    prefix = "nats_per_byte/"
    return Trained(**job, losses={name.removeprefix(prefix): value for name, value in evaluation.items()
                                  if name.startswith(prefix)},
                   violation=float(np.mean([step["moe/max_violation/mean"] for step in last])),
                   local_violation=float(np.mean([step["moe/local_max_violation/mean"] for step in last])),
                   information=float(np.mean(information)),
                   step_s=float(np.median([step["time/step"] for step in steps])),
                   corpus=environment["data"], made_with=f"torch {environment['torch']}, commit {commit}")


def interpolated(runs: Sequence[Trained], arms: Mapping[str, Arm]) -> dict[str, float]:
    """Strength at which the violation of each arm of stage 1 is the target; not of arms with runs missing."""
    curves = {arm: [_mean(runs, arm, strength, "violation") for strength in about.strengths]
              for arm, about in arms.items()}
    curves = {arm: curve for arm, curve in curves.items() if not np.isnan(curve).any()}
    if not curves:
        return {}
    # Noise may let a stronger loss balance less.
    curves = {arm: np.minimum.accumulate(curve) for arm, curve in curves.items()}
    target = max(curve[-1] for curve in curves.values())
    return {arm: float(np.exp(np.interp(-np.log(target), -np.log(curve), np.log(arms[arm].strengths))))
            for arm, curve in curves.items()}


def _mean(runs: Sequence[Trained], arm: str, strength: float, what: str) -> float:
    values = [getattr(run, what) for run in runs
              if run.stage == 1 and run.arm == arm and run.strength == strength]
    return float(np.mean(values)) if values else float("nan")


def paired(ours: Sequence[Trained], theirs: Sequence[Trained],
           what=lambda run: run.losses["mean"]) -> Difference | None:
    """Difference of `what` between runs of one seed, in stage 1 of one strength too; None below two pairs."""
    other = {(run.seed, run.strength if run.stage == 1 else 0): what(run) for run in theirs}
    values = [what(run) - other[run.seed, run.strength if run.stage == 1 else 0] for run in ours
              if (run.seed, run.strength if run.stage == 1 else 0) in other]
    return difference(values)


# --- the page


def write_page(runs: list[Trained], arms: Mapping[str, Arm], final: Sequence[str],
               stages: Mapping[int, tuple], where: str, path: Path) -> Path:
    """Write the page and its picture.

    Args:
        runs: all finished runs.
        arms: arms of stage 1, by name.
        final: arms of stage 2.
        stages: steps and seeds of each stage.
        where: the machine.
        path: the page.
    """
    first, second = ([run for run in runs if run.stage == stage] for stage in (1, 2))
    planned = (len(stages[1][1]) * sum(len(arm.strengths) for arm in arms.values()),
               len(stages[2][1]) * len(final))
    lines = ["# Effect of balancing over the global batch", "",
             "`python -m tools.study.balance --stage 1`, then `--stage 2`; the tool's module docstring "
             f"describes the runs and their comparison. {where}. Losses are held-out nats per byte, the "
             "unweighted mean over five domains. Violation is the largest load of an expert over the mean "
             f"load, minus one, as a mean over routers and the last {LAST} steps: *global* for a whole "
             "step, *local* inside the micro-batches of a rank. Information is the mutual information of "
             "expert and domain in nats (at most ln 5 = 1.61). "
             f"Made with {'; '.join(sorted({run.made_with for run in runs})) or 'nothing yet'}.", "",
             f"Finished: {len(first)} of {planned[0]} runs of stage 1 ({stages[1][0]} steps, "
             f"seeds {_listed(stages[1][1])}), {len(second)} of "
             f"{planned[1]} of stage 2 ({stages[2][0]} steps, seeds {_listed(stages[2][1])})."
             + (" **The others are missing.**" if (len(first), len(second)) != planned else ""), ""]
    lines += _sensitivity(first, stages)
    lines += _first(first, arms)
    lines += _second(second, final, interpolated(runs, arms))
    if first or second:
        draw(first, second, final, path.with_suffix(".png"))
        lines.insert(2, f"![Losses and violations]({path.with_suffix('.png').name})\n")
    path.write_text("\n".join(lines).rstrip() + "\n")
    return path


def _sensitivity(first: list[Trained], stages: Mapping[int, tuple]) -> list[str]:
    """Smallest difference that stage 2 can see, from stage 1 alone."""
    by_arm = {arm: [run for run in first if run.arm == arm] for arm in ("exact", "micro")}
    found = paired(by_arm["exact"], by_arm["micro"])
    if found is None:
        return ["The smallest visible difference is unknown until the pairs of stage 1 have finished.", ""]
    seeds = len(stages[2][1])
    smallest = smallest_seen(found.spread, seeds)
    return [f"**Smallest difference that stage 2 can see**, from the spread of the {found.seeds} pairs of "
            f"`exact` and `micro` in stage 1 (standard deviation {found.spread:.4f}): {smallest:.4f} nats "
            f"per byte with {seeds} seeds, two-sided 95 %. Smaller differences cannot be distinguished from "
            "zero.", ""]


def _first(runs: list[Trained], arms: Mapping[str, Arm]) -> list[str]:
    lines = ["## Stage 1: every arm at three strengths", "",
             "| arm | strength | seeds | loss | against `micro` at this weight "
             "| global violation | local violation | information |",
             "|---|---|---|---|---|---|---|---|"]
    for arm, about in arms.items():
        for strength in about.strengths:
            mine = [run for run in runs if run.arm == arm and run.strength == strength]
            if mine:
                micro = [run for run in runs if run.arm == "micro" and run.strength == strength]
                pairs = [run.losses["mean"] - other.losses["mean"]
                         for run in mine for other in micro if run.seed == other.seed]
                compared = about.key == "balance.weight" and arm != "micro"
                against = ", ".join(f"{pair:+.4f}" for pair in pairs) if compared else ""
                lines.append(f"| {arm} | {about.key}={strength:g} | {len(mine)} "
                             f"| {_average(mine, lambda run: run.losses['mean'], 4)} | {against} "
                             f"| {_figures(mine)} |")
    return [*lines, ""]


def _second(runs: list[Trained], final: Sequence[str], strength: Mapping[str, float]) -> list[str]:
    if not runs:
        at = ", ".join(f"{arm} {strength[arm]:.3g}" for arm in final if arm in strength)
        return ["## Stage 2: at equal balance", "",
                f"Nothing has finished. It will run at these strengths: {at or 'not known yet'}.", ""]
    micro = [run for run in runs if run.arm == "micro"]
    domains = [name for name in runs[0].losses if name != "mean"]
    of = {arm: [run for run in runs if run.arm == arm] for arm in final}
    of = {arm: mine for arm, mine in of.items() if mine}
    lines = ["## Stage 2: at equal balance", "",
             "Every arm runs at the strength at which, by stage 1, it reaches the tightest balance that all "
             "arms reach.",
             "",
             "| arm | strength | seeds | loss | global violation | local violation | information |",
             "|" + "---|" * 7]
    for arm, mine in of.items():
        lines.append(f"| {arm} | {mine[0].strength:.3g} | {len(mine)} "
                     f"| {_average(mine, lambda run: run.losses['mean'], 4)} | {_figures(mine)} |")
    lines += ["", "Differences from `micro` with the same seed: mean and 95 % interval (Student's t). "
              "A negative difference of the loss is better.", "",
              "| arm | loss | " + " | ".join(domains) + " | information |", "|" + "---|" * (3 + len(domains))]
    apart: dict[str, list[str]] = {"loss": [], "information": []}
    for arm, mine in of.items():
        if arm == "micro":
            continue
        loss, information = paired(mine, micro), paired(mine, micro, lambda run: run.information)
        by_domain = (paired(mine, micro, lambda run, name=name: run.losses[name]) for name in domains)
        cells = [loss, *by_domain, information]
        lines.append(f"| {arm} | " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |")
        for what, found in (("loss", loss), ("information", information)):
            if found and abs(found.mean) > found.half:
                apart[what].append(arm)
    told = "; ".join(f"by {what}: {', '.join(arms) or 'none'}" for what, arms in apart.items())
    return [*lines, "", "Arms that differ from `micro` (the interval excludes zero, without correction "
            f"for the number of comparisons) {told}.", ""]


def _figures(runs: list[Trained]) -> str:
    """Cells of FIGURES: means over the runs."""
    return " | ".join(_average(runs, lambda run, what=what: getattr(run, what), digits)
                      for what, digits in FIGURES)


def _average(runs: list[Trained], what, digits: int) -> str:
    values = [what(run) for run in runs]
    spread = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def draw(first: list[Trained], second: list[Trained], final: Sequence[str], path: Path) -> None:
    """Draw the results.

    Stage 1: loss and local violation over global violation. Stage 2: loss against micro of the same seed, and
    information.

    Args:
        first: runs of stage 1.
        second: runs of stage 2.
        final: arms of stage 2.
        path: the picture.
    """
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    names = dict.fromkeys(run.arm for run in (*first, *second))
    colors = {arm: f"C{index}" for index, arm in enumerate(names)}
    rows = 2 if second else 1
    figure, axes = plt.subplots(rows, 2, figsize=(10, 4.3 * rows), constrained_layout=True, squeeze=False)
    (left, right), *lower = axes
    for axis, text, title, what in (
        (left, "held-out nats per byte", "Stage 1: loss and balance", lambda run: run.losses["mean"]),
        (right, "violation inside micro-batches",
         "Stage 1: how much local imbalance goes with global balance", lambda run: run.local_violation),
    ):
        _over_violation(axis, first, colors, what)
        axis.set_ylabel(text)
        axis.set_title(title, fontsize=10)
    right.legend(fontsize=8)
    for left, right in lower:
        micro = {run.seed: run.losses["mean"] for run in second if run.arm == "micro"}
        _by_arm(left, [run for run in second if run.arm != "micro" and run.seed in micro], final[1:], colors,
                lambda run: run.losses["mean"] - micro[run.seed])
        left.axhline(0, color="grey", lw=0.8)
        left.set_ylabel("nats per byte")
        left.set_title("Stage 2: loss, difference to micro of the same seed (bars: mean)", fontsize=10)
        _by_arm(right, second, final, colors, lambda run: run.information)
        right.set_ylim(bottom=0)
        right.set_ylabel("nats")
        right.set_title("Stage 2: what the choice of an expert says about the domain", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _over_violation(axis, runs: list[Trained], colors: Mapping[str, str],
                    what: Callable[[Trained], float]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    for arm, color in colors.items():
        mine = [run for run in runs if run.arm == arm]
        axis.scatter([run.violation for run in mine], [what(run) for run in mine], color=color, label=arm,
                     s=28)
    axis.set(xlabel="violation of the whole step", xscale="log")
    axis.xaxis.set_major_locator(FixedLocator([0.1, 0.2, 0.5, 1, 2, 5, 10]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.grid(alpha=0.3)


def _by_arm(axis, runs: list[Trained], arms: Sequence[str], colors: Mapping[str, str],
            what: Callable[[Trained], float]) -> None:
    """Draw a dot for each seed, and a bar at the mean."""
    for place, arm in enumerate(arms):
        values = [what(run) for run in runs if run.arm == arm]
        axis.scatter([place] * len(values), values, color=colors.get(arm), s=28)
        if values:
            axis.hlines(np.mean(values), place - 0.2, place + 0.2, color=colors[arm])
    axis.set_xticks(range(len(arms)), arms, fontsize=8)
    axis.set_xlim(-0.5, len(arms) - 0.5)
    axis.grid(alpha=0.3)
