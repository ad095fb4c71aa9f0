"""Pictures of what experts are chosen for, from the records of log.routing: `<run.dir>/report/routing_*.png`.

    routing_information    what token id, previous token, position and domain tell of the expert
    routing_churn          tokens of the probe whose first choice is another one than before; flips
    routing_layers         what the first choice of one layer tells of another's
    routing_entropy        of the routers' probabilities, on held-out text and on shifted input
    routing_experts        collapse, tokens without an expert, clusters of representations
    routing_drops          slots that capacity drops, by place in the sequence; where any are dropped

All values are in routing.csv; routing.py computes them. A headline says what is seen. Lines differ by marker
and dash as well as by color, and bars by hatching, so that the pictures can be read in grayscale.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from moetrain.report.loads import GRAY, INK
from moetrain.report.output import Lettering, report_file, write_csv
from moetrain.report.routing import (
    SOURCES,
    Evaluations,
    by_input,
    churn_between,
    churn_to_last,
    drop_rates,
    entropies,
    explained,
    layer_information,
    read_evaluations,
    rows,
    told,
    told_over_steps,
)
from moetrain.runs.routing_record import COLLAPSED, DECILES, collapsed, largest_share, purity

COLORS = ("#1f4e79", "#c0392b", "#e0a030", "#7f9f7f", "#8e6bb0", "0.45")
HATCHES = ("", "///", "...", "xx", "\\\\\\", "++")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", ":", "-.")


def draw_routing(run_dir: Path) -> list[Path]:
    """Draw all pictures and write routing.csv; returns the paths of the pictures, none without records."""
    found = read_evaluations(run_dir / "log" / "routing")
    if found is None:
        return []
    folder = run_dir / "report"
    write_csv(folder / "routing.csv", rows(found))
    pictures = {"information": _information, "churn": _churn, "layers": _layers, "entropy": _entropy,
                "experts": _experts}
    if any(record.dropped.any() for _, record in by_input(found)):
        pictures["drops"] = _drops
    for name, draw in pictures.items():
        draw(found, folder / f"routing_{name}.png")
    return [folder / f"routing_{name}.png" for name in pictures]


@contextmanager
def _picture(path: Path, headline: str, names: list[str], panels: int, *,
             height: float = 4.2) -> Iterator[tuple[Any, Lettering]]:
    """Panels beside each other, which are saved when the block ends."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    inked = ("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color")
    style = {"font.size": 10, "axes.titlesize": 11, "hatch.linewidth": 0.6, "axes.axisbelow": True,
             **dict.fromkeys(inked, INK)}
    with rc_context(style), Lettering(names) as lettering:
        figure = Figure(figsize=(11, height), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(headline, fontsize=13, fontweight="bold", x=0.01, ha="left")
        axes = figure.subplots(1, panels, squeeze=False)[0]
        yield axes, lettering
        for panel in axes:
            panel.spines[["top", "right"]].set_visible(False)
        with report_file(path) as file:
            figure.savefig(file, format="png")


def _information(found: Evaluations, path: Path) -> None:
    """What token id, previous token, position and domain tell of the expert."""
    shares = {title: told(found.last, source) for source, title in SOURCES.items()}
    pure = np.mean([purity(table) for table in found.last.ids])
    headline = (f"The token id alone tells {shares['token id'].mean():.0%} of its expert, "
                f"the position {shares['position'].mean():.0%}")
    with _picture(path, headline, _names(found), 2) as ((left, right), lettering):
        _bars(left, shares, found, lettering)
        left.set_title(f"Step {found.last.step}; the most frequent expert of an id takes {pure:.0%} of it",
                       loc="left")
        left.set_ylabel("share of the expert's entropy that is told")
        for number, (source, title) in enumerate(SOURCES.items()):
            _line(right, found.steps, told_over_steps(found, source), number, title)
        right.set_title("Over the evaluations, mean over routers", loc="left")
        _over_steps(right, found.steps)


def _churn(found: Evaluations, path: Path) -> None:
    """How first choices change from evaluation to evaluation."""
    steps, shares_SR, flips_SR = churn_between(found)
    to_last_steps, to_last = churn_to_last(found)
    if len(steps) > 1:
        headline = (f"From one evaluation to the next {shares_SR[0].mean():.0%} of tokens change their first "
                    f"expert at first, {shares_SR[-1].mean():.0%} at the end")
    else:
        headline = "Churn: tokens whose first expert changes between evaluations"
    with _picture(path, headline, _names(found), 2) as ((left, right), lettering):
        for number, (name, shares_S, flips_S) in enumerate(zip(_names(found), shares_SR.T, flips_SR.T)):
            if len(steps):  # a legend of lines that are not there would take the panel's place
                _line(left, steps, shares_S, number, lettering(name))
                _line(right, steps, flips_S, number, lettering(name))
        if len(steps):
            left.plot(to_last_steps, to_last, color="0.35", linewidth=2.4, alpha=0.6,
                      label="from here to the last, mean")
        left.set_title("First choices that differ from the evaluation before", loc="left")
        left.set_ylabel("share of the probe's tokens")
        right.set_title("Flips", loc="left")
        right.set_ylabel("experts that a token takes up or leaves")
        for panel in (left, right):
            _over_steps(panel, found.steps)
            if not len(steps):
                panel.text(0.5, 0.5, "one evaluation only", ha="center", transform=panel.transAxes)


def _layers(found: Evaluations, path: Path) -> None:
    """What the first choice of one layer tells of another's."""
    shares_RR = layer_information(found.last)
    several = np.isfinite(shares_RR).any()
    headline = "One router: there are no two layers to compare"
    if several:
        next_one = np.nanmean(np.diagonal(shares_RR, 1))
        headline = f"The first choice of one layer tells {next_one:.0%} of the next one's on average"
    names = _names(found)
    with _picture(path, headline, names, 1, height=1.8 + 0.45 * len(names)) as ((axes,), lettering):
        axes.set_facecolor(GRAY)
        image = axes.pcolormesh(np.ma.masked_invalid(shares_RR), cmap="viridis", vmin=0,
                                vmax=max(0.1, float(np.nanmax(shares_RR)) if several else 0.1),
                                edgecolors="white", linewidth=0.6)
        for one, other in np.argwhere(np.isfinite(shares_RR)):
            axes.text(other + 0.5, one + 0.5, f"{shares_RR[one, other]:.2f}", ha="center", va="center",
                      fontsize=9, bbox={"boxstyle": "round,pad=0.15", "color": "white", "alpha": 0.75})
        ticks = np.arange(len(names)) + 0.5
        axes.set(ylim=(len(names), 0), xlabel="router whose first choice is told", ylabel="router that tells")
        axes.set_xticks(ticks, labels=[lettering(name) for name in names])
        axes.set_yticks(ticks, labels=[lettering(name) for name in names])
        axes.tick_params(length=0)
        axes.set_title(f"Mutual information over the entropy of the later choice, step {found.last.step}",
                       loc="left")
        axes.figure.colorbar(image, ax=axes, pad=0.015).set_label("share that is told")


def _entropy(found: Evaluations, path: Path) -> None:
    """Entropy of the routers, on held-out text and on shifted input."""
    of = entropies(found)
    own, shifted = of["held-out text"].mean(), of["the same in random order"].mean()
    how = "as sure" if abs(shifted - own) < 0.005 else "surer" if shifted < own else "less sure"
    headline = (f"Routers are {how} on shifted input: entropy {own:.3f} on held-out text, {shifted:.3f} in "
                "random order")
    with _picture(path, headline, [*_names(found), *of], 2) as ((left, right), lettering):
        _bars(left, {lettering(title): values for title, values in of.items()}, found, lettering)
        left.set_title(f"Step {found.last.step}", loc="left")
        left.set_ylabel("entropy of the probabilities / log(experts)")
        for number, title in enumerate(("held-out text", "the same in random order")):
            means = [entropies(Evaluations([record], {}))[title].mean() for record in found.own]
            _line(right, found.steps, np.array(means), number, title)
        right.set_title("Over the evaluations, mean over routers", loc="left")
        _over_steps(right, found.steps)


def _experts(found: Evaluations, path: Path) -> None:
    """Collapse, tokens without an expert, and clusters of representations."""
    last = found.last
    names, down = _names(found), [name for r, name in enumerate(_names(found)) if collapsed(last, r)]
    unrouted = (last.unrouted[0] / max(1, int(last.tokens[0]))).mean()
    headline = (f"{len(down)} of {len(names)} routers {'has' if len(down) == 1 else 'have'} collapsed"
                if down else "No router has collapsed")
    headline += f"; {unrouted:.1%} of tokens have no expert" if unrouted else "; every token has an expert"
    with _picture(path, headline, names, 2) as ((left, right), lettering):
        for r, name in enumerate(names):
            shares = np.array([largest_share(record, r) for record in found.own])
            _line(left, found.steps, shares, r, lettering(name))
        left.axhline(COLLAPSED, color="0.35", linewidth=1, linestyle=(0, (1, 2)))
        left.set_title("Tokens that take the most used expert; dotted: collapse", loc="left")
        left.set_ylabel("share of tokens")
        left.set_ylim(0, 1.02)
        _over_steps(left, found.steps)
        _bars(right, {"inputs' spread between first choices": explained(last),
                      "tokens without an expert": last.unrouted[0] / max(1, int(last.tokens[0]))},
              found, lettering)
        right.set_title(f"Spread of inputs, and tokens without an expert, step {last.step}", loc="left")
        right.set_ylabel("share")


def _drops(found: Evaluations, path: Path) -> None:
    """Slots that capacity drops, by place in the sequence."""
    rates = drop_rates(found)
    own = rates["held-out text"]
    headline = (f"Capacity drops {own[0]:.1%} of slots in the first tenth of a sequence, "
                f"{own[-1]:.1%} in the last")
    with _picture(path, headline, list(rates), 1) as ((axes,), lettering):
        for number, (title, values) in enumerate(rates.items()):
            _line(axes, np.arange(1, DECILES + 1), values, number, lettering(title))
        axes.set_title(f"Mean over routers, step {found.last.step}", loc="left")
        axes.set(xlabel="tenth of the sequence", ylabel="share of chosen slots that are dropped")
        axes.set_ylim(0, None)
        axes.set_xticks(range(1, DECILES + 1))
        axes.grid(axis="y", color="0.9")
        axes.legend(frameon=False)


def _names(found: Evaluations) -> list[str]:
    return [str(name) for name in found.last.routers]


def _bars(axes: Any, groups: Mapping[str, np.ndarray], found: Evaluations, lettering: Lettering) -> None:
    """Bars by router, one of each group beside the other."""
    names, width = _names(found), 0.8 / len(groups)
    for number, (title, values) in enumerate(groups.items()):
        places = np.arange(len(names)) + (number - (len(groups) - 1) / 2) * width
        axes.bar(places, values, width, label=title, color=COLORS[number % len(COLORS)],
                 hatch=HATCHES[number % len(HATCHES)], edgecolor="white")
    axes.set_xticks(range(len(names)), labels=[lettering(name) for name in names],
                    rotation=30 if len(names) > 4 else 0, ha="right" if len(names) > 4 else "center")
    axes.set_ylim(0, 1.3 * max(0.01, max(float(values.max()) for values in groups.values())))
    axes.grid(axis="y", color="0.9")
    axes.legend(frameon=False, fontsize=9, loc="upper left", ncols=2)


def _line(axes: Any, x: np.ndarray, values: np.ndarray, number: int, label: str) -> None:
    axes.plot(x, values, color=COLORS[number % len(COLORS)], marker=MARKERS[number % len(MARKERS)],
              linestyle=DASHES[number % len(DASHES)], markersize=5, linewidth=1.5, label=label, clip_on=False)


def _over_steps(axes: Any, steps: np.ndarray) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("optimizer step")
    axes.set_xlim(steps[0] - 0.5, max(steps[-1], steps[0] + 1))
    axes.set_ylim(0, max(0.01, 1.05 * axes.get_ylim()[1]))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="0.9")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)
