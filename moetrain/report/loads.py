"""Picture of a run's expert loads: `<run.dir>/report/expert_load.png`, with its values as CSV beside it.

    load of an expert = its tokens / mean over the experts of its router    1 is perfect, 2 is twice the mean
    max violation     = max load - 1                                        of one step

It has three panels: the load at the end, router by expert; the same over time, on the same scale; and the max
violation of every router over steps. Only loads.npz is read, so a run can be drawn without its checkpoint.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moetrain.errors import DataError
from moetrain.report.arrays import Form, read_arrays
from moetrain.report.output import Lettering, report_file, write_csv

# The end of a run: its last tenth, but no more than this many steps.
LAST_STEPS = 100
SNAPSHOTS = 5
# Diverging around the mean; red and blue differ in every common form of color blindness.
COLOR_MAP, SCALE = "RdBu_r", (0.0, 2.0)
GRAY, INK = "0.88", "0.2"


class Loads(NamedTuple):
    """Recorded tokens per expert."""

    counts: np.ndarray   # [steps, routers, E_max], NaN beyond a router's experts
    steps: np.ndarray    # [steps], ascending
    routers: list[str]
    experts: np.ndarray  # [routers], number of experts

    def load(self, window: slice) -> np.ndarray:
        """Tokens per expert in a window of steps over the router's mean: [routers, E_max]."""
        return _over_mean(self.counts[window].sum(0))

    def violation(self) -> np.ndarray:
        """Max violation: [steps, routers]; 0 where nothing was routed."""
        return np.maximum(np.nanmax(_over_mean(self.counts), axis=-1) - 1, 0)

    def span(self, window: slice) -> str:
        """First and last step of a window, as text."""
        first, last = self.steps[window][[0, -1]]
        return f"step {first}" if first == last else f"steps {first}–{last}"


def draw_loads(run_dir: Path) -> Path:
    """Draw the picture and return its path; writes expert_load.csv and max_violation.csv beside it."""
    loads = read_loads(Path(run_dir) / "loads.npz")
    folder = Path(run_dir) / "report"
    end, times = last_steps(len(loads.steps)), snapshots(len(loads.steps))
    _write_csv(loads, end, times, folder)
    _draw(loads, end, times, folder / "expert_load.png")
    return folder / "expert_load.png"


FORMS = {"loads": Form("integers", ("steps", "routers", "experts of the largest router")),
         "experts": Form("integers", ("routers",)), "routers": Form("text", ("routers",)),
         "steps": Form("integers", ("steps",))}


def read_loads(path: Path) -> Loads:
    """Read loads.npz; DataError where it is damaged or empty."""
    try:
        arrays = read_arrays(path, FORMS)
        counts, experts, names, steps = arrays["loads"], arrays["experts"], arrays["routers"], arrays["steps"]
        if counts.size and (experts.min() < 1 or experts.max() > counts.shape[-1]):
            raise ValueError("a router has no experts, or more than there is room for")
        if counts.size and counts.min() < 0 or (np.diff(steps) <= 0).any():
            raise ValueError("a count of tokens is negative, or the steps are not in order")
    except ValueError as error:
        raise DataError(60, "tokens per expert cannot be read", where=str(path), why=str(error),
                        next="train the run for a step or more; a damaged file can be moved away: "
                             "`moetrain report` builds it again") from error
    if not counts.size:
        raise DataError(61, "there are no tokens per expert to draw", where=str(path),
                        why=f"{len(steps)} steps and {len(names)} routers are recorded",
                        next="a model with experts (model.num_experts), trained for a step or more")
    beyond = np.arange(counts.shape[-1]) >= experts[:, None]
    return Loads(np.where(beyond, np.nan, counts.astype(np.float64)), steps, [str(name) for name in names],
                 experts)


def last_steps(steps: int) -> slice:
    """The window of steps that counts as the end of a run."""
    return slice(steps - max(1, min(LAST_STEPS, steps // 10)), steps)


def snapshots(steps: int) -> list[slice]:
    """Up to SNAPSHOTS windows over the run, of equal length as far as rounding allows."""
    edges = np.linspace(0, steps, min(SNAPSHOTS, steps) + 1).round().astype(int).tolist()
    return [slice(first, last) for first, last in pairwise(edges)]


def headline(loads: Loads, end: slice) -> str:
    """Sum up the picture in a line."""
    load = loads.load(end)
    dead, total = int((load == 0).sum()), int(loads.experts.sum())
    heaviest = np.unravel_index(np.nanargmax(load), load.shape)
    where = f" ({loads.routers[heaviest[0]]}, expert {heaviest[1]})" if len(loads.routers) > 1 else ""
    experts = f"{dead} of {total} experts {'is' if dead == 1 else 'are'} dead" if dead else "no dead experts"
    return f"Heaviest expert carries {load[heaviest]:.1f}x the mean{where}; {experts}"


def _over_mean(counts: np.ndarray) -> np.ndarray:
    mean = np.nanmean(counts, axis=-1, keepdims=True)
    return counts / np.where(mean > 0, mean, 1)


# --- CSV


def _write_csv(loads: Loads, end: slice, times: list[slice], folder: Path) -> None:
    windows = {"end": end, **{loads.span(window).replace("–", "-"): window for window in times}}
    columns = {f"load, {loads.span(end).replace('–', '-')} (the end)" if name == "end" else f"load, {name}":
               loads.load(window) for name, window in windows.items()}
    per_step = loads.counts[end].mean(0)
    experts = [[name, e, f"{per_step[r, e]:.6g}", *(f"{load[r, e]:.6g}" for load in columns.values())]
               for r, (name, count) in enumerate(zip(loads.routers, loads.experts)) for e in range(count)]
    write_csv(folder / "expert_load.csv",
              [["router", "expert", "tokens per step at the end", *columns], *experts])
    steps = ([step, *(f"{value:.6g}" for value in row)] for step, row in zip(loads.steps, loads.violation()))
    write_csv(folder / "max_violation.csv", [["step", *loads.routers], *steps])


# --- the picture


def _draw(loads: Loads, end: slice, times: list[slice], path: Path) -> None:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    top = float(np.clip(0.3 * len(loads.routers), 1.2, 6.0))
    middle = float(np.clip(0.14 * len(loads.routers), 0.7, 2.6)) if len(times) > 1 else 0.0
    style = {"font.size": 10, "axes.titlesize": 11, "axes.edgecolor": INK, "axes.labelcolor": INK,
             "text.color": INK, "xtick.color": INK, "ytick.color": INK}
    with Lettering(loads.routers), rc_context(style):
        figure = Figure(figsize=(11, top + middle + (2.1 if middle else 1.3) + 3.2), dpi=120,
                        layout="constrained")
        FigureCanvasAgg(figure)
        figure.get_layout_engine().set(h_pad=0.09, w_pad=0.06)
        figure.suptitle(headline(loads, end), fontsize=14, fontweight="bold", x=0.01, ha="left")
        above, below = figure.subfigures(2, 1, height_ratios=[top + middle + (1.9 if middle else 1.1), 2.8])
        _over_experts(above, loads, end, times if middle else [], [top, middle])
        _over_steps(below.add_subplot(), loads, end)
        with report_file(path) as file:
            figure.savefig(file, format="png")


def _over_experts(figure: Any, loads: Loads, end: slice, times: list[slice], heights: list[float]) -> None:
    grid = figure.add_gridspec(2 if times else 1, max(1, len(times)),
                               height_ratios=heights[:2 if times else 1])
    final = figure.add_subplot(grid[0, :])
    image = _heatmap(final, loads.load(end), large=True)
    final.set_title(f"Load at the end ({loads.span(end)})", loc="left")
    _name_routers(final, loads.routers, most=24)
    panels = [figure.add_subplot(grid[1, i]) for i in range(len(times))]
    for i, (panel, window) in enumerate(zip(panels, times)):
        _heatmap(panel, loads.load(window), large=False)
        panel.set_title(loads.span(window), fontsize=10)
        _name_routers(panel, loads.routers if i == 0 else [], most=6)
    bar = figure.colorbar(image, ax=[final, *panels], extend="max", pad=0.015, aspect=38)
    bar.set_label("load (tokens / mean over experts)")
    bar.set_ticks([0, 0.5, 1, 1.5, 2], labels=["0", "0.5", "1 = mean", "1.5", "2"])


def _heatmap(axes: Any, load: np.ndarray, *, large: bool) -> Any:
    """Draw loads as cells; a large panel marks dead experts and has figures in its cells where they fit."""
    routers, experts = load.shape
    apart = large and experts <= 96
    axes.set_facecolor(GRAY)  # shows where a router has no such expert
    image = axes.pcolormesh(np.ma.masked_invalid(load), cmap=COLOR_MAP, vmin=SCALE[0], vmax=SCALE[1],
                            edgecolors="white" if apart else "none", linewidth=0.6 if apart else 0,
                            rasterized=True)
    if large:
        r, e = np.nonzero(load == 0)
        axes.scatter(e + 0.5, r + 0.5, marker="x", color="white", s=22, linewidth=1.3)
    if large and experts <= 16 and routers <= 24:
        for r, e in np.argwhere(load > 0):
            axes.text(e + 0.5, r + 0.5, f"{load[r, e]:.2f}", ha="center", va="center", fontsize=8,
                      color="white" if abs(load[r, e] - 1) > 0.65 else INK)
    axes.set(xlim=(0, experts), ylim=(routers, 0), xlabel="expert")
    most = (32 if experts < 100 else 16) if large else 4
    step = 1 << max(0, (-(-experts // most) - 1).bit_length())  # a power of two: `most` ticks or fewer
    axes.set_xticks(np.arange(0, experts, step) + 0.5, labels=[str(e) for e in range(0, experts, step)])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image


def _name_routers(axes: Any, names: list[str], *, most: int) -> None:
    shown = range(0, len(names), -(-len(names) // most) or 1)
    axes.set_yticks([r + 0.5 for r in shown], labels=[names[r] for r in shown])


def _over_steps(axes: Any, loads: Loads, end: slice) -> None:
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    violation = loads.violation()
    colors = colormaps["viridis"](np.linspace(0, 0.9, len(loads.routers)))
    window = max(1, len(loads.steps) // 40)
    for name, values, color in zip(loads.routers, violation.T, colors):
        if window > 1:
            axes.plot(loads.steps, values, color=color, linewidth=0.6, alpha=0.25)
        axes.plot(loads.steps, trailing_mean(values, window), color=color, linewidth=1.6, label=name,
                  marker="o" if len(loads.steps) == 1 else None, clip_on=False)
    begin = slice(0, end.stop - end.start)
    before, after = violation[begin].mean(), violation[end].mean()
    verb = "falls" if after < 0.95 * before else "rises" if after > 1.05 * before else "stays"
    title = f"from {before:.2f} to {after:.2f}" if verb != "stays" else f"at {after:.2f}"
    axes.set_title(f"Max violation {verb} {title} (mean over routers)"
                   + (f"; bold: mean of {window} steps" if window > 1 else ""), loc="left")
    axes.set(xlabel="optimizer step", ylabel="max violation\n(max / mean load − 1)", ylim=(0, None))
    axes.set_xlim(loads.steps[0], max(loads.steps[-1], loads.steps[0] + 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    shown = np.unique(np.linspace(0, len(handles) - 1, min(8, len(handles))).round().astype(int))
    axes.legend([handles[i] for i in shown], [labels[i] for i in shown], loc="center left",
                bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9, alignment="left",
                title="router" if len(shown) == len(handles) else "router (some)")


def trailing_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the last `window` steps, over fewer at the start."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    last = np.arange(1, len(total))
    first = np.maximum(last - window, 0)
    return (total[last] - total[first]) / (last - first)
