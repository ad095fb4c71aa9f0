"""Training and held-out loss of a run as a picture: `<run.dir>/report/loss.png`, its values beside it as CSV.

Reads metrics.jsonl, eval.jsonl and log/attempts.jsonl, so a run is drawn without its checkpoint and while it
trains. A line that cannot be read is left out.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moetrain.files import open_regular, parse_json, shown
from moetrain.report.loads import GREY, INK, trailing_mean
from moetrain.report.output import Lettering, report_file, write_csv
from moetrain.units import count

LINE_BYTES = 1 << 20                                     # of a record; a longer line is not one
MOST_POINTS = 4000                                       # of single steps that are drawn, evenly spaced
MOST_DOMAINS = 8                                         # that are drawn by name
TRAINING, HELDOUT = "#1f4e79", "#c0392b"                 # told apart in grayscale by line and marker, too


class Losses(NamedTuple):
    """Nats per token, by step; held-out losses by domain, `mean` among them, and nats per byte of their mean, NaN where they are unknown."""

    steps: np.ndarray
    tokens: np.ndarray
    training: np.ndarray
    evaluated: np.ndarray                                # steps of the evaluations
    heldout: dict[str, np.ndarray]
    nats_per_byte: np.ndarray
    resumed: list[int]                                   # steps from which a later attempt went on


def draw_loss(run_dir: Path) -> Path | None:
    """Draw the picture and return its path; None where no step is recorded."""
    found = read_losses(run_dir)
    if not len(found.steps):
        return None
    folder = run_dir / "report"
    write_csv(folder / "loss.csv", _rows(found))
    _draw(found, folder / "loss.png")
    return folder / "loss.png"


def read_losses(run_dir: Path) -> Losses:
    """What the records of a run say of its losses."""
    steps = _records(run_dir / "metrics.jsonl", "step", "tokens", "loss/ce")
    evaluations = _records(run_dir / "eval.jsonl", "step", "loss/mean")
    starts = [int(record["start"]) for record in _records(run_dir / "log" / "attempts.jsonl", "start")]
    found = (name for record in evaluations for name in record if name.startswith("loss/"))
    names = dict.fromkeys(name.removeprefix("loss/") for name in found)
    return Losses(
        *(np.array([record[name] for record in steps], dtype=float) for name in ("step", "tokens", "loss/ce")),
        np.array([record["step"] for record in evaluations], dtype=float),
        {name: np.array([record.get(f"loss/{name}", math.nan) for record in evaluations], dtype=float)
         for name in names},
        np.array([record.get("nats_per_byte/mean", math.nan) for record in evaluations], dtype=float),
        sorted({start for start in starts if steps and 0 < start < steps[-1]["step"]}))


def _records(path: Path, *names: str) -> list[dict[str, float]]:
    """The numbers of every record that has all of `names`; nothing where there is no file."""
    found = []
    try:
        file = open_regular(path)
    except OSError:
        return []
    with file:
        while line := file.readline(LINE_BYTES):
            try:
                record = parse_json(line)
            except ValueError:
                continue
            if not isinstance(record, dict) or "command" in record:      # of `moetrain eval`, on whatever data
                continue
            numbers = {name: value for name, value in record.items() if type(value) in (int, float)}
            if numbers.keys() >= set(names):
                found.append(numbers)
    return found


def finding(found: Losses) -> str:
    """What the picture shows, in a line."""
    first, last = found.training[0], _end(found)
    verb = "falls" if last < first else "goes"
    text = f"Training loss {verb} from {first:.2f} to {last:.2f} nats per token in {count(found.tokens[-1])} tokens"
    if not len(found.evaluated):
        return text
    bits = found.nats_per_byte[-1] / math.log(2)
    return f"{text}; held-out {found.heldout['mean'][-1]:.2f}" + ("" if math.isnan(bits) else f" ({bits:.2f} bits per byte)")


def _window(found: Losses) -> int:
    return max(1, len(found.steps) // 50)


def _end(found: Losses) -> float:
    """Training loss at the end: the mean of the last window."""
    return float(np.mean(found.training[-_window(found):]))


def _rows(found: Losses) -> Iterator[list[object]]:
    """Of the CSV: every step, and its evaluation where there was one."""
    evaluations = {step: index for index, step in enumerate(found.evaluated)}
    trained = dict(zip(found.steps, zip(found.tokens, found.training)))
    yield ["step", "tokens", "training", *(f"held-out {shown(name)}" for name in found.heldout), "resumed"]
    for step in sorted({*trained, *evaluations, *map(float, found.resumed)}):
        tokens, loss = trained.get(step, ("", ""))
        held = [f"{values[evaluations[step]]:.6g}" if step in evaluations else ""
                for values in found.heldout.values()]
        yield [int(step), tokens and int(tokens), loss and f"{loss:.6g}", *held, int(step in found.resumed)]


# --- the picture ----------------------------------------------------------------------------------------------------


def _draw(found: Losses, path: Path) -> None:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    inked = ("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color")
    style = {"font.size": 10, **dict.fromkeys(inked, INK)}
    with rc_context(style), Lettering(found.heldout) as lettering:
        figure = Figure(figsize=(11, 5.4), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(finding(found), fontsize=12, fontweight="bold", x=0.01, ha="left")
        axes = figure.add_subplot()
        labels = [*_draw_training(axes, found), *_draw_heldout(axes, found, lettering)]
        _draw_resumes(axes, found)
        _finish(axes, found)
        figure.draw_without_rendering()                  # so that the axes know their height
        _write_labels(axes, labels)
        with report_file(path) as file:
            figure.savefig(file, format="png")


Label = tuple[float, str, str, str]                      # where on the axis of losses, text, color, weight


def _draw_training(axes: Any, found: Losses) -> list[Label]:
    window = _window(found)
    every = slice(None, None, -(-len(found.steps) // MOST_POINTS))
    tokens, smooth = found.tokens[every], trailing_mean(found.training, window)[every]
    if window > 1:
        axes.plot(tokens, found.training[every], color="0.75", linewidth=0.7, zorder=1, label="each step")
    axes.plot(tokens, smooth, color=TRAINING, linewidth=2, zorder=3, marker="o" if len(found.steps) == 1 else None,
              label=f"training, mean of {window} steps" if window > 1 else "training")
    return [(_end(found), f"training {_end(found):.2f}", TRAINING, "bold")]


def _draw_heldout(axes: Any, found: Losses, lettering: Lettering) -> list[Label]:
    """The mean over domains, and behind it the domains by name where there are two or more."""
    if not len(found.evaluated):
        return []
    tokens = np.interp(found.evaluated, found.steps, found.tokens)
    domains = [name for name in found.heldout if name != "mean"]
    labels = []
    for name in domains[:MOST_DOMAINS] if len(domains) > 1 else ():
        losses = found.heldout[name]
        axes.plot(tokens, losses, color="0.5", linewidth=0.9, linestyle=":", marker=".", markersize=5, zorder=2)
        labels.append((losses[-1], f"{lettering(name)} {losses[-1]:.2f}", "0.35", "normal"))
    mean = found.heldout["mean"]
    axes.plot(tokens, mean, color=HELDOUT, linewidth=1.6, linestyle="--", marker="D", markersize=6,
              markerfacecolor="white", markeredgewidth=1.6, zorder=4,
              label="held-out" + (f", mean of {len(domains)} domains" if len(domains) > 1 else ""))
    return [*labels, (mean[-1], f"held-out {mean[-1]:.2f}", HELDOUT, "bold")]


def _draw_resumes(axes: Any, found: Losses) -> None:
    for number, tokens in enumerate(np.interp(found.resumed, found.steps, found.tokens)):
        axes.axvline(tokens, color="0.35", linewidth=1, linestyle=(0, (1, 2)), zorder=0,
                     label=None if number else "resumed")


def _finish(axes: Any, found: Losses) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    end = float(max(found.tokens[-1], 1))
    smooth = trailing_mean(found.training, _window(found))
    seen = np.concatenate([smooth, *found.heldout.values()])
    seen = seen[np.isfinite(seen)]
    if len(seen):
        room = 0.06 * (seen.max() - seen.min()) or 0.1
        axes.set_ylim(seen.min() - room, seen.max() + room)
    axes.set(xlim=(0, end), xlabel="tokens trained on", ylabel="loss (nats per token)")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: count(tokens)))
    steps, tokens = np.concatenate([[0], found.steps]), np.concatenate([[0], found.tokens])
    above = axes.secondary_xaxis("top", functions=(lambda at: np.interp(at, tokens, steps),
                                                   lambda at: np.interp(at, steps, tokens)))
    above.set_xlabel("optimizer step")
    above.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color=GREY)
    axes.set_axisbelow(True)
    axes.spines["right"].set_visible(False)
    axes.legend(loc="best", frameon=False)


def _write_labels(axes: Any, labels: list[Label]) -> None:
    """At the right end of the lines, moved apart where they would lie on each other."""
    low, high = axes.get_ylim()
    height = (high - low) * 15 / axes.get_window_extent().height * axes.figure.dpi / 72
    labels = sorted((label for label in labels if math.isfinite(label[0])), key=lambda label: label[0])
    up, down = [label[0] for label in labels], [min(label[0], high) for label in labels]
    for index in range(1, len(labels)):
        up[index] = max(up[index], up[index - 1] + height)
        down[-index - 1] = min(down[-index - 1], down[-index] - height)
    for above, below, (_, text, color, weight) in zip(up, down, labels):
        place = (above + below) / 2                      # both keep their distances, so does what lies between
        axes.annotate(text, (1, place), xytext=(8, 0), xycoords=("axes fraction", "data"),
                      textcoords="offset points", color=color, fontweight=weight, va="center", annotation_clip=False)
