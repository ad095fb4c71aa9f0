"""Console output of a run: banner, step lines, a progress bar, expert loads as a heat map, and the summary.

The functions turn plain values into text; loggers/step_line.py has the step line, and
docs/reference/output.md explains every word. `Console` decides where text goes: only rank 0 prints; a
terminal gets a progress bar with the lines above it, anything else plain lines. Other events have a line of
their own with a tag such as [warn]: they come from the logger `moetrain`, which `Console` connects.
"""

import logging
import math
import os
import shutil
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TextIO

from moetrain.files import shown
from moetrain.train.loggers.step_line import StepMeans, fold, part, step_parts
from moetrain.units import duration

SHADES, ASCII_SHADES = "▁▂▃▄▅▆▇█", ".:-=+*#@"
DEAD = "x"
BANNER_LINES = 25
MOST_DOMAINS = 12  # domains named in an [eval] line


def banner(rows: Sequence[tuple[str, str]]) -> str:
    """Align rows of label and value.

    A first row without a label is the title. Any other row without one continues the row above.
    """
    width = max((len(label) for label, _ in rows), default=0)
    rows = [(label, shown(value)) for label, value in rows]
    lines = [f"{label:{width}s}  {value}".rstrip() if label or i else value
             for i, (label, value) in enumerate(rows)]
    assert len(lines) <= BANNER_LINES and "\n" not in "".join(lines), len(lines)
    return "\n".join(lines)


def summary(rows: Sequence[tuple[str, str]], commands: Sequence[str]) -> str:
    """Format how the run ended, and commands to type next."""
    labels = ["next", *[""] * len(commands)]
    return banner([*rows, *zip(labels, commands)])


def eval_line(step: int, losses: Mapping[str, float]) -> str:
    """Format an evaluation's losses by domain, and their mean also in bits.

    They are in nats per byte, or per token where the number of bytes is unknown.
    """
    per_byte = "nats_per_byte/mean" in losses
    kind = "nats_per_byte/" if per_byte else "loss/"
    by_domain = {name.removeprefix(kind): value for name, value in losses.items() if name.startswith(kind)}
    mean = by_domain.pop("mean", 0.0)
    words = [f"{shown(name)} {value:.3f}" for name, value in list(by_domain.items())[:MOST_DOMAINS]]
    more = [f"{len(by_domain) - len(words)} more in eval.jsonl"] if len(by_domain) > len(words) else []
    bits = f" ({mean / math.log(2):.3f} bits)" if per_byte else ""
    return (f"[eval] step {step}, nats per {'byte' if per_byte else 'token'}: "
            f"{'  '.join([*words, *more, f'mean {mean:.3f}'])}{bits}")


def heatmap(counts_RE: Sequence[Sequence[float]], names: Sequence[str], width: int = 80, *,
            unicode: bool = True) -> str:
    """Format tokens per expert as a heat map with a row for each router.

    Eight shades go from 0 to twice the mean of the row; x marks an expert without tokens. Where
    more experts exist than fit into `width`, neighbors share a column, which shows their mean, or x
    when one of them has no tokens.

    Args:
        counts_RE: tokens of every expert of each router; rows may differ in length.
        names: of the routers.
        width: columns of the terminal.
        unicode: whether the terminal can show block characters.
    """
    shades = SHADES if unicode else ASCII_SHADES
    label = max(map(len, names), default=0)
    tails = [f"max {max(row) / _mean(row):.2f}x"
             + (f"  dead {dead}" if (dead := sum(n == 0 for n in row)) else "")
             for row in counts_RE]
    room = max(8, width - label - max(map(len, tails), default=0) - 4)
    widest = max(map(len, counts_RE), default=1)
    together, cell = -(-widest // room), max(1, min(3, room // widest))
    lines = [f"tokens per expert:  {shades[0]} near 0  {shades[4]} mean  {shades[-1]} twice the mean  "
             f"{DEAD} no tokens"
             + (f"  ({together} experts a column)" if together > 1 else "")]
    for name, row, tail in zip(names, counts_RE, tails):
        cells = [_shade(row[i:i + together], _mean(row), shades) * cell for i in range(0, len(row), together)]
        lines.append(f"{name:{label}s}  {''.join(cells):{-(-widest // together) * cell}s}  {tail}".rstrip())
    return "\n".join(lines)


def _shade(counts: Sequence[float], mean: float, shades: str) -> str:
    if min(counts) == 0:
        return DEAD
    return shades[min(len(shades) - 1, int(_mean(counts) / mean / 2 * len(shades)))]


def _mean(row: Sequence[float]) -> float:
    return sum(row) / len(row) or 1.0


class Eta:
    """Estimate of the time left: the recent median of step times, and evaluations and saves per step."""

    def __init__(self, recent: int = 50) -> None:
        self._times: deque[float] = deque(maxlen=recent)
        self._first: float | None = None  # end of the first step, so that start-up does not count
        self._last, self._inside, self._steps = 0.0, 0.0, 0

    def add(self, step_s: float, now: float) -> None:
        """Record a step that has just ended, at time `now`."""
        self._times.append(step_s)
        self._last = now
        if self._first is None:
            self._first = now
        else:
            self._inside += step_s
            self._steps += 1

    def seconds(self, remaining: int) -> float | None:
        """Seconds that the remaining steps will take; None before the first step."""
        if not self._times:
            return None
        beside = max(0.0, self._last - (self._first or 0.0) - self._inside) / max(1, self._steps)
        return remaining * (statistics.median(self._times) + beside)


class Console:
    """Output of a run on rank 0; other ranks are silent.

    It is a context manager, which removes the progress bar and restores the logger when it is left.

    Args:
        rank: this rank.
        steps: number of steps of the schedule.
        last: step after which this process stops; None means `steps`.
        interval: number of steps between step lines; a line covers the steps since the one before.
        progress: whether to show a progress bar on a terminal.
        stream: where to write; standard output by default.
    """

    def __init__(self, *, rank: int, steps: int, last: int | None = None, interval: int = 1,
                 progress: bool = True, stream: TextIO | None = None) -> None:
        self.silent = rank != 0
        self.stream = stream or sys.stdout
        self.terminal = self.stream.isatty() and os.environ.get("TERM") != "dumb"
        self.unicode = can_show(SHADES, self.stream)
        self._steps, self._start, self._last, self._interval = (
            steps, 0, steps if last is None else last, interval)
        self._with_bar, self._eta = progress and self.terminal and not self.silent, Eta()
        self._bar: Any = None                                # rich's, once it is shown
        self._means = StepMeans()
        self._restore_logging = connect_logging(None if self.silent else self.line)

    def banner(self, rows: Sequence[tuple[str, str]]) -> None:
        """Print the banner."""
        self.line(banner(rows))

    def resume_at(self, step: int) -> None:
        """Set the number of steps that were taken before this process started."""
        self._start = step

    def step(self, metrics: Mapping[str, float]) -> None:
        """Record a step, and print a line when one is due. To be called after every step."""
        if self.silent:
            return
        step = int(metrics["step"])
        self._means.add(metrics)
        self._eta.add(metrics.get("time/step", 0.0), time.monotonic())
        eta_s = self._eta.seconds(max(0, self._last - step))
        if self._with_bar:
            self._move_bar(step, metrics, eta_s)
        if step % max(1, self._interval) == 0 or step in (self._start + 1, self._last):
            parts = step_parts(self._means.take(), self._steps, eta_s)
            self.line(fold(parts, self.width) if self.terminal else " | ".join(parts))

    def heatmap(self, counts: Mapping[str, Iterable[int]]) -> None:
        """Print tokens per expert of each router as a heat map."""
        if counts and not self.silent:
            self.line(heatmap([list(row) for row in counts.values()], list(counts), self.width,
                              unicode=self.unicode))

    def summary(self, rows: Sequence[tuple[str, str]], commands: Sequence[str] = ()) -> None:
        """Remove the progress bar and print the summary."""
        self._stop_bar()
        self.line(summary(rows, commands))

    def line(self, text: str) -> None:
        """Print one or several lines, above a progress bar. Unprintable characters are escaped."""
        if self.silent:
            return
        text = "\n".join(map(shown, text.split("\n")))
        if not self.unicode:
            text = text.encode(_encoding(self.stream), "replace").decode(_encoding(self.stream))
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            self.stream.write(f"{text}\n")
            self.stream.flush()

    @property
    def width(self) -> int:
        """Columns of the terminal; 120 for other streams."""
        return shutil.get_terminal_size((120, 24)).columns if self.terminal else 120

    def close(self) -> None:
        """Remove the progress bar and restore the logger."""
        self._stop_bar()
        self._restore_logging()

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _move_bar(self, step: int, metrics: Mapping[str, float], eta_s: float | None) -> None:
        if self._bar is None:
            self._bar = _make_bar(self.stream)
            self._bar.add_task("", total=self._last, completed=self._start, loss="", eta="")
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=step,
                         loss=part("loss {:.3f}", metrics.get("loss/ce")),
                         eta=part("eta {}", eta_s, duration))

    def _stop_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def connect_logging(write: Callable[[str], None] | None) -> Callable[[], None]:
    """Pass messages of the logger `moetrain`, from INFO on, to `write` as tagged lines; None drops them.

    Returns a function that restores the logger.
    """
    logger = logging.getLogger("moetrain")
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    handler = logging.NullHandler() if write is None else _LineHandler(write)
    handler.setFormatter(TagFormatter())
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)

    def restore() -> None:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)

    return restore


class TagFormatter(logging.Formatter):
    """Formatter that tags warnings with [warn] and errors with [error]; a message's own tag is kept.

    Control characters in paths and texts among the arguments are escaped, so that a message
    stays on one line.
    """

    def format(self, record: logging.LogRecord) -> str:
        if isinstance(record.args, tuple):
            record = logging.makeLogRecord({**record.__dict__, "args": tuple(
                shown(value) if isinstance(value, (str, os.PathLike)) else value for value in record.args)})
        text = super().format(record)
        tag = ("[error] " if record.levelno >= logging.ERROR
               else "[warn] " if record.levelno >= logging.WARNING else "")
        return text if text.startswith("[") else tag + text


class _LineHandler(logging.Handler):
    def __init__(self, write: Callable[[str], None]) -> None:
        super().__init__()
        self.write = write

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.write(self.format(record))
        except Exception:
            self.handleError(record)


def can_show(text: str, stream: TextIO) -> bool:
    """Whether the encoding of a stream has the characters of a text."""
    try:
        text.encode(_encoding(stream))
        return True
    except (UnicodeEncodeError, LookupError):
        return False


def _encoding(stream: TextIO) -> str:
    return getattr(stream, "encoding", None) or "ascii"


def _make_bar(stream: TextIO) -> Any:
    """Make a progress bar that disappears at its end; rich itself respects NO_COLOR."""
    import rich.console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    columns = (TextColumn("train"), BarColumn(), TaskProgressColumn(), MofNCompleteColumn(),
               TextColumn("{task.fields[loss]}"), TimeElapsedColumn(), TextColumn("{task.fields[eta]}"))
    return Progress(*columns, transient=True, refresh_per_second=4, console=rich.console.Console(file=stream))
