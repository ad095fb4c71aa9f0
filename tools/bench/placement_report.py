"""Result of tools/bench/placement.py: ratios with their intervals, a table, a page and a picture."""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

CEILING, DRAWS, SEED = "ceiling", 2000, 7
GAP = 0.1                 # of the ceiling's time: below it there is nothing that could be recovered
# Ceilings are the same work in every trace. One this much longer than the shortest: the machine was busy.
BUSY = 1.1
INK = "#1f2a36"


class Ratio(NamedTuple):
    """Median of the ratios of step times, and the middle 95 % of what other draws of steps would give."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f}x [{self.low:.2f}, {self.high:.2f}]"


def ratio(over: list[float], under: list[float]) -> Ratio:
    """Ratio of two series, step by step in pairs."""
    return mean_ratio([(over, under)])


def mean_ratio(pairs: list[tuple[list[float], list[float]]]) -> Ratio:
    """Geometric mean of the ratios over traces; steps are drawn again within each trace."""
    draw = np.random.default_rng(SEED)
    logs = np.zeros(DRAWS)
    for over, under in pairs:
        steps = draw.integers(len(over), size=(DRAWS, len(over)))
        logs += np.log(np.median((np.asarray(over) / np.asarray(under))[steps], axis=1))
    value = statistics.geometric_mean(float(np.median(np.asarray(over) / np.asarray(under)))
                                      for over, under in pairs)
    return Ratio(value, *np.exp(np.quantile(logs / len(pairs), [0.025, 0.975])).tolist())


def recovered(seconds: dict[str, list[float]], arm: str) -> float | None:
    """Share of the time between ep and the ceiling that an arm wins back; None where they hardly differ."""
    ep, ceiling = statistics.median(seconds["ep"]), statistics.median(seconds[CEILING])
    return (ep - statistics.median(seconds[arm])) / (ep - ceiling) if ep > (1 + GAP) * ceiling else None


def quiet(result: dict) -> tuple[dict, list[str]]:
    """Leave out the traces during which the machine was busy, and return their names too."""
    ceiling = {name: statistics.median(trace["seconds"][CEILING]) for name, trace in result["traces"].items()}
    busy = [name for name, seconds in ceiling.items() if seconds > BUSY * min(ceiling.values())]
    kept = {name: trace for name, trace in result["traces"].items() if name not in busy}
    return {**result, "traces": kept}, busy


# --- tables


def table(result: dict) -> str:
    """All tables of a result, as Markdown."""
    result, busy = quiet(result)
    head = f"machine busy, no verdict: {', '.join(busy)}\n\n" if busy else ""
    real = [unpaced(result)] if result["options"]["real_steps"] else []
    return head + "\n\n".join([times(result), rivals(result), sent(result), *real])


def times(result: dict) -> str:
    """Table by trace and arm: how much faster than ep, and the share recovered."""
    def cell(trace: dict, arm: str) -> str:
        seconds = trace["seconds"]
        share = recovered(seconds, arm)
        return f"{ratio(seconds['ep'], seconds[arm])}" + ("" if share is None else f" {share:.0%}")

    traces = result["traces"].values()
    first = [("rank load", lambda trace: f"{trace['rank_load']:.2f}"),
             ("ep ms", lambda trace: _ms(trace, "ep")),
             ("ceiling ms", lambda trace: _ms(trace, CEILING)),
             ("ceiling", lambda trace: f"{_speed(trace, CEILING):.2f}x")]
    arms = [arm for arm in result["options"]["planners"] if arm != "ep"]
    mean = ["geometric mean", "", "", "", str(_over_traces(traces, "ep", CEILING).value.__round__(2)) + "x",
            *(str(_over_traces(traces, "ep", arm)) for arm in arms)]
    return _table(result, [*first, *((arm, lambda trace, arm=arm: cell(trace, arm)) for arm in arms)], [mean])


def rivals(result: dict) -> str:
    """Table of ours against each of the others, on the geometric mean of all traces."""
    traces = result["traces"].values()
    lines = ["| geometric mean over all traces | time of it over ours |", "|---|---|"]
    for arm in [*result["options"]["planners"], CEILING]:
        if arm != "balanced" and "balanced" in result["options"]["planners"]:
            lines.append(f"| {arm} | {_over_traces(traces, arm, 'balanced')} |")
    return "\n".join(lines)


def verdicts(result: dict) -> str:
    """Lines that hold the results against our own targets, case by case."""
    traces, lines = result["traces"], []
    for name, trace in traces.items():
        seconds, ceiling = trace["seconds"], _speed(trace, CEILING)
        ours, share = ratio(seconds["ep"], seconds["balanced"]), recovered(seconds, "balanced")
        if "#" not in name and trace["rank_load"] >= 2 and share is not None:
            lines.append(f"- {name}, recorded, rank load {trace['rank_load']:.1f}: "
                         f"{share:.0%} recovered (target: 80%)")
        if ceiling >= 1.8:
            lines.append(f"- {name}, ceiling {ceiling:.2f}x: {ours} over ep (target: 1.5x)")
        if trace["rank_load"] < 1.05:
            lines.append(f"- {name}, at balance: {ours} over ep (target: 0.98x or more)")
    ahead = {arm: _over_traces(traces.values(), arm, "balanced") for arm in result["options"]["planners"]
             if arm != "ep" and not arm.startswith("balanced")}
    lines += [f"- {arm} takes {mean} of the time of ours on the geometric mean: {_who_is_ahead(mean)}"
              for arm, mean in ahead.items()]
    return "\n".join(lines)
    return "\n".join(lines)


def _who_is_ahead(mean: Ratio) -> str:
    if mean.low > 1:
        return "ours is ahead"
    return "it is ahead" if mean.high < 1 else "no difference beyond the noise"

def sent(result: dict) -> str:
    """Table of a step's bytes of all ranks, inside / between nodes, of the calls of a rank, and of copies."""
    def cell(counts: dict) -> str:
        return (f"{counts['inside'] / 1e6:.2f} / {counts['between'] / 1e6:.2f}, "
                f"{counts['calls']:.0f}, {counts['copies']:.1f}")

    arms = [*result["options"]["planners"], CEILING]
    return _table(result, [(arm, lambda trace, arm=arm: cell(trace["sent"][arm])) for arm in arms],
                  head="trace (MB inside / between, calls, copies)")


def unpaced(result: dict) -> str:
    """Table of how much faster than ep when experts are computed for real and nothing else is."""
    def cell(trace: dict, arm: str) -> str:
        found = ratio(trace["unpaced"]["seconds"]["ep"], trace["unpaced"]["seconds"][arm])
        one_step = result["options"]["real_steps"] == 1          # it has no interval
        return f"{found.value:.2f}x" if one_step else str(found)

    arms = [arm for arm in [*result["options"]["planners"], CEILING] if arm != "ep"]
    return _table(result, [("ep ms", lambda trace: _ms(trace["unpaced"], "ep")),
                           *((arm, lambda trace, arm=arm: cell(trace, arm)) for arm in arms)],
                  head="trace, unpaced")


def _table(result: dict, columns: list[tuple[str, Callable[[dict], str]]], below: list[list[str]] = (),
           head: str = "trace") -> str:
    lines = [[head, *(name for name, _ in columns)], ["---"] * (1 + len(columns))]
    lines += [[name, *(cell(trace) for _, cell in columns)] for name, trace in result["traces"].items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in [*lines, *below])


def _ms(trace: dict, arm: str) -> str:
    return f"{statistics.median(trace['seconds'][arm]) * 1e3:.0f}"


def _over_traces(traces: list[dict], over: str, under: str) -> Ratio:
    return mean_ratio([(trace["seconds"][over], trace["seconds"][under]) for trace in traces])


# --- page and picture


def write(result: dict, page: Path) -> None:
    """Write the page, and beside it a picture of the same name."""
    picture = page.with_suffix(".png")
    draw(result, picture)
    page.write_text(text(result, picture.name))


def text(result: dict, picture: str) -> str:
    """The page, as Markdown."""
    result, busy = quiet(result)
    options, facts = result["options"], result["facts"]
    carried, handed = sum(result["wire_bytes"].values()), result["handed_over_bytes"]
    left_out = ""
    if busy:
        left_out = ("Left out, as the machine was busy (the ceiling took more than "
                    f"{BUSY} times its shortest): {', '.join(busy)}.\n\n")
    return f"""# Planners side by side

**On emulated links**: {options["nodes"]} nodes x {options["per_node"]} ranks, {options["inside"]} inside a \
node and {options["between"]} between nodes, per rank and direction. Machine: {facts["machine"]}, load \
average {facts["load average"][0]} to {facts["load average"][1]} (the ranks' own included); torch \
{facts["torch"]}, commit {facts["commit"]}. A load well above the number of cores means that other programs \
ran. Intervals are then wide, and differences of a few percent mean nothing.

    {facts["command"]}

![Speed-up over expert parallelism]({picture})

Times are those of two layers, forward and backward. The computation is replaced by sleeps \
({options["row_us"]:.0f} us per row; attention {options["hidden_ms"]:.0f} ms forward and twice that \
backward); everything else is real. A rank has {options["rows"]} rows per layer on average, and at most \
{options["max_copies"]} copies per layer.

A cell such as `1.43x [1.40, 1.46] 87%` gives the time of `ep` over that of the planner (the median of \
{options["steps"]} paired steps), the middle 95 % over resampled steps, and the recovered share of the time \
between `ep` and the ceiling (force-balanced routing), if the ceiling is {1 + GAP:.1f}x or more. `rank load` \
is the largest load of a rank over the mean under `ep`. A planner with `+oracle` knows the loads of the step \
itself instead of a forecast, one with `+nodes` knows loads by node, and one with `+cut` may slice experts \
(`parallel.max_sliced_experts=4`).

{left_out}{times(result)}

{rivals(result)}

## Against the targets

{verdicts(result)}

## Bytes and calls of a step

The bytes are those that the ranks pass to their collectives. At every step they equal the number that \
follows from rows, plan and sizes. Over the whole run the links carried {carried / handed:.3f} times these \
bytes (headers, acknowledgements, barriers).

{sent(result)}

## Unpaced

The same traces with real computation of the experts ({result["unpaced_row_us"]:.0f} us per row with all \
ranks at work, which the planners know) and without attention. The ranks share the cores, so the time of the \
computation hardly depends on its placement. Steps per trace: {options["real_steps"]}.

{unpaced(result) if options["real_steps"] else "Not measured."}

## What the links carry, and what that costs the cores

    {chr(10).join(result["links"]).replace(chr(10), chr(10) + "    ")}
"""


def draw(result: dict, path: Path) -> None:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    result, _ = quiet(result)
    traces = sorted(result["traces"].items(), key=lambda item: _speed(item[1], CEILING))
    arms = [arm for arm in result["options"]["planners"] if arm != "ep"]
    colors = {"text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK}
    with rc_context({"font.size": 9, **colors}):
        figure = Figure(figsize=(9, 1.6 + 0.24 * len(traces)), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for arm, marker in zip(arms, "os^vDPX*<>hd"):
            ours = arm.startswith("balanced")
            axes.scatter([_speed(trace, arm) for _, trace in traces], range(len(traces)), label=arm,
                         marker=marker, s=46 if ours else 22, zorder=3 if ours else 2,
                         alpha=1.0 if ours else 0.7)
        axes.scatter([_speed(trace, CEILING) for _, trace in traces], range(len(traces)), marker="|", s=160,
                     color=INK, label=CEILING)
        axes.axvline(1.0, color="0.6", linewidth=1)
        axes.set_yticks(range(len(traces)),
                        labels=[f"{name}  ({trace['rank_load']:.1f})" for name, trace in traces])
        axes.set_xlabel("times faster than expert parallelism (in brackets: rank load, max / mean)")
        title = f"emulated links {result['options']['inside']} : {result['options']['between']}"
        if "balanced" in arms:
            mean = _over_traces([trace for _, trace in traces], "ep", "balanced")
            title = (f"balanced: {mean.value:.2f}x over expert parallelism on the geometric mean\n{title}")
        axes.set_title(title, loc="left", fontsize=10)
        axes.grid(axis="x", color="0.92")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="lower right", frameon=False)
        figure.savefig(path)


def _speed(trace: dict, arm: str) -> float:
    return ratio(trace["seconds"]["ep"], trace["seconds"][arm]).value
