"""Picture of a run's training and held-out loss: `<run.dir>/report/loss.png`, its values as CSV beside it.

It reads metrics.jsonl, eval.jsonl and log/attempts.jsonl, so a run can be drawn without its checkpoint and
while it trains. Damaged lines are left out.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moetrain.files import open_regular, parse_json, shown
from moetrain.report.loads import GRAY, INK, trailing_mean
from moetrain.report.output import Lettering, report_file, write_csv
from moetrain.units import count

MAX_LINE = 1 << 20  # bytes; a longer line is no record
MAX_POINTS = 4000   # single steps drawn, evenly spaced
MAX_DOMAINS = 8     # domains drawn by name
TRAINING, HELDOUT = "#1f4e79", "#c0392b"  # they differ by line and marker, too, for grayscale


class Losses(NamedTuple):
    """Losses of a run, in nats per token."""

    steps: np.ndarray               # of training
    tokens: np.ndarray              # trained on, at each of the steps
    training: np.ndarray            # at each of the steps
    evaluated: np.ndarray           # steps of the evaluations
    heldout: dict[str, np.ndarray]  # at each evaluation, by domain and as `mean`; NaN where unknown
    nats_per_byte: np.ndarray       # mean over domains at each evaluation; NaN where unknown
    resumed: list[int]              # steps from which a later attempt resumed


def draw_loss(run_dir: Path) -> Path | None:
    """Draw the picture and return its path; None where no step is recorded."""
    losses = read_losses(run_dir)
    if not len(losses.steps):
        return None
    folder = run_dir / "report"
    write_csv(folder / "loss.csv", _rows(losses))
    _draw(losses, folder / "loss.png")
    return folder / "loss.png"


def read_losses(run_dir: Path) -> Losses:
    """Read the losses from the records of a run."""
    steps = records(run_dir / "metrics.jsonl", "step", "tokens", "loss/ce")
    evaluations = records(run_dir / "eval.jsonl", "step", "loss/mean")
    starts = [int(record["start"]) for record in records(run_dir / "log" / "attempts.jsonl", "start")]
    keys = (name for record in evaluations for name in record if name.startswith("loss/"))
    names = dict.fromkeys(name.removeprefix("loss/") for name in keys)
    at, tokens, trained = (np.array([record[name] for record in steps], dtype=float)
                           for name in ("step", "tokens", "loss/ce"))
    return Losses(
        at, tokens, trained,
        np.array([record["step"] for record in evaluations], dtype=float),
        {name: np.array([record.get(f"loss/{name}", math.nan) for record in evaluations], dtype=float)
         for name in names},
        np.array([record.get("nats_per_byte/mean", math.nan) for record in evaluations], dtype=float),
        sorted({start for start in starts if steps and 0 < start < steps[-1]["step"]}))


def records(path: Path, *names: str) -> list[dict[str, float]]:
    """Read the numbers of every record that has all of `names`; empty where there is no file."""
    found = []
    try:
        file = open_regular(path)
    except OSError:
        return []
    with file:
        while line := file.readline(MAX_LINE):
            try:
                record = parse_json(line)
            except ValueError:
                continue
            # A record with a command is of `moetrain eval`, possibly on other data.
            if not isinstance(record, dict) or "command" in record:
                continue
            numbers = {name: value for name, value in record.items() if type(value) in (int, float)}
            if numbers.keys() >= set(names):
                found.append(numbers)
    return found


def headline(losses: Losses) -> str:
    """Sum up the picture in a line."""
    first, last = losses.training[0], _end(losses)
    verb = "falls" if last < first else "goes"
    text = (f"Training loss {verb} from {first:.2f} to {last:.2f} nats per token "
            f"in {count(losses.tokens[-1])} tokens")
    if not len(losses.evaluated):
        return text
    bits = losses.nats_per_byte[-1] / math.log(2)
    return (f"{text}; held-out {losses.heldout['mean'][-1]:.2f}"
            + ("" if math.isnan(bits) else f" ({bits:.2f} bits per byte)"))


def _window(losses: Losses) -> int:
    """Number of steps over which the training loss is smoothed."""
    return max(1, len(losses.steps) // 50)


def _end(losses: Losses) -> float:
    """Training loss at the end: mean of the last window."""
    return float(np.mean(losses.training[-_window(losses):]))


def _rows(losses: Losses) -> Iterator[list[object]]:
    """Rows of the CSV: every step, and its evaluation where there was one."""
    evaluations = {step: index for index, step in enumerate(losses.evaluated)}
    trained = dict(zip(losses.steps, zip(losses.tokens, losses.training)))
    yield ["step", "tokens", "training", *(f"held-out {shown(name)}" for name in losses.heldout), "resumed"]
    for step in sorted({*trained, *evaluations, *map(float, losses.resumed)}):
        tokens, loss = trained.get(step, ("", ""))
        held = [f"{values[evaluations[step]]:.6g}" if step in evaluations else ""
                for values in losses.heldout.values()]
        yield [int(step), tokens and int(tokens), loss and f"{loss:.6g}", *held, int(step in losses.resumed)]


# --- the picture


def _draw(losses: Losses, path: Path) -> None:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    inked = ("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color")
    style = {"font.size": 10, **dict.fromkeys(inked, INK)}
    with rc_context(style), Lettering(losses.heldout) as lettering:
        figure = Figure(figsize=(11, 5.4), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(headline(losses), fontsize=12, fontweight="bold", x=0.01, ha="left")
        axes = figure.add_subplot()
        labels = [*_draw_training(axes, losses), *_draw_heldout(axes, losses, lettering)]
        _draw_resumes(axes, losses)
        _finish(axes, losses)
        figure.draw_without_rendering()  # the height of the axes is known only afterwards
        _write_labels(axes, labels)
        with report_file(path) as file:
            figure.savefig(file, format="png")


Label = tuple[float, str, str, str]  # place on the axis of losses, text, color, weight


def _draw_training(axes: Any, losses: Losses) -> list[Label]:
    window = _window(losses)
    every = slice(None, None, -(-len(losses.steps) // MAX_POINTS))
    tokens, smooth = losses.tokens[every], trailing_mean(losses.training, window)[every]
    if window > 1:
        axes.plot(tokens, losses.training[every], color="0.75", linewidth=0.7, zorder=1, label="each step")
    axes.plot(tokens, smooth, color=TRAINING, linewidth=2, zorder=3,
              marker="o" if len(losses.steps) == 1 else None,
              label=f"training, mean of {window} steps" if window > 1 else "training")
    return [(_end(losses), f"training {_end(losses):.2f}", TRAINING, "bold")]


def _draw_heldout(axes: Any, losses: Losses, lettering: Lettering) -> list[Label]:
    """Draw the mean over domains, and behind it each domain where there are two or more."""
    if not len(losses.evaluated):
        return []
    tokens = np.interp(losses.evaluated, losses.steps, losses.tokens)
    domains = [name for name in losses.heldout if name != "mean"]
    labels = []
    for name in domains[:MAX_DOMAINS] if len(domains) > 1 else ():
        values = losses.heldout[name]
        axes.plot(tokens, values, color="0.5", linewidth=0.9, linestyle=":", marker=".", markersize=5,
                  zorder=2)
        labels.append((values[-1], f"{lettering(name)} {values[-1]:.2f}", "0.35", "normal"))
    mean = losses.heldout["mean"]
    axes.plot(tokens, mean, color=HELDOUT, linewidth=1.6, linestyle="--", marker="D", markersize=6,
              markerfacecolor="white", markeredgewidth=1.6, zorder=4,
              label="held-out" + (f", mean of {len(domains)} domains" if len(domains) > 1 else ""))
    return [*labels, (mean[-1], f"held-out {mean[-1]:.2f}", HELDOUT, "bold")]


def _draw_resumes(axes: Any, losses: Losses) -> None:
    for number, tokens in enumerate(np.interp(losses.resumed, losses.steps, losses.tokens)):
        axes.axvline(tokens, color="0.35", linewidth=1, linestyle=(0, (1, 2)), zorder=0,
                     label=None if number else "resumed")


def _finish(axes: Any, losses: Losses) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    end = float(max(losses.tokens[-1], 1))
    smooth = trailing_mean(losses.training, _window(losses))
    seen = np.concatenate([smooth, *losses.heldout.values()])
    seen = seen[np.isfinite(seen)]
    if len(seen):
        room = 0.06 * (seen.max() - seen.min()) or 0.1
        axes.set_ylim(seen.min() - room, seen.max() + room)
    axes.set(xlim=(0, end), xlabel="tokens trained on", ylabel="loss (nats per token)")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: count(tokens)))
    steps, tokens = np.concatenate([[0], losses.steps]), np.concatenate([[0], losses.tokens])
    above = axes.secondary_xaxis("top", functions=(lambda at: np.interp(at, tokens, steps),
                                                   lambda at: np.interp(at, steps, tokens)))
    above.set_xlabel("optimizer step")
    above.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color=GRAY)
    axes.set_axisbelow(True)
    axes.spines["right"].set_visible(False)
    axes.legend(loc="best", frameon=False)


def _write_labels(axes: Any, labels: list[Label]) -> None:
    """Write a label at the right end of each line, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    height = (high - low) * 15 / axes.get_window_extent().height * axes.figure.dpi / 72
    labels = sorted((label for label in labels if math.isfinite(label[0])), key=lambda label: label[0])
    up, down = [label[0] for label in labels], [min(label[0], high) for label in labels]
    for index in range(1, len(labels)):
        up[index] = max(up[index], up[index - 1] + height)
        down[-index - 1] = min(down[-index - 1], down[-index] - height)
    for above, below, (_, text, color, weight) in zip(up, down, labels):
        place = (above + below) / 2  # labels keep their distance in both lists, and so in the mean
        axes.annotate(text, (1, place), xytext=(8, 0), xycoords=("axes fraction", "data"),
                      textcoords="offset points", color=color, fontweight=weight, va="center",
                      annotation_clip=False)
