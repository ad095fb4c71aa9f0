"""What a run shows: banner, step lines, a progress bar, tokens per expert as a picture, the summary.

The functions turn plain values into text; the step line is loggers/step_line.py, and docs/reference/output.md says what
every word means. `Console` decides where text goes: rank 0 alone speaks; a terminal gets a
progress bar with the lines above it, anything else plain lines. What happens besides has a line of its own with a tag,
such as [warn]: that is the logger `moetrain`, which `Console` connects.
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
MOST_DOMAINS = 12                # of an [eval] line


def banner(rows: Sequence[tuple[str, str]]) -> str:
    """Rows of label and value, aligned. The first may have no label: it says name and run. Another without one goes on
    where the row above began."""
    width = max((len(label) for label, _ in rows), default=0)
    rows = [(label, shown(value)) for label, value in rows]
    lines = [f"{label:{width}s}  {value}".rstrip() if label or i else value for i, (label, value) in enumerate(rows)]
    assert len(lines) <= BANNER_LINES and "\n" not in "".join(lines), len(lines)
    return "\n".join(lines)


def summary(rows: Sequence[tuple[str, str]], commands: Sequence[str]) -> str:
    """How the run ended, and what to type next."""
    labels = ["next", *[""] * len(commands)]
    return banner([*rows, *zip(labels, commands)])


def eval_line(step: int, losses: Mapping[str, float]) -> str:
    """What an evaluation found, by domain; bits of the mean beside it. Nats per token where nobody knows the bytes."""
    per_byte = "nats_per_byte/mean" in losses
    kind = "nats_per_byte/" if per_byte else "loss/"
    by_domain = {name.removeprefix(kind): value for name, value in losses.items() if name.startswith(kind)}
    mean = by_domain.pop("mean", 0.0)
    told = [f"{shown(name)} {value:.3f}" for name, value in list(by_domain.items())[:MOST_DOMAINS]]
    more = [f"{len(by_domain) - len(told)} more in eval.jsonl"] if len(by_domain) > len(told) else []
    bits = f" ({mean / math.log(2):.3f} bits)" if per_byte else ""
    return f"[eval] step {step}, nats per {'byte' if per_byte else 'token'}: {'  '.join([*told, *more, f'mean {mean:.3f}'])}{bits}"


def heatmap(counts_RE: Sequence[Sequence[float]], names: Sequence[str], width: int = 80, *,
            unicode: bool = True) -> str:
    """Tokens per expert, a row a router: eight shades from 0 to twice the mean of the row, x where no token went.

    counts_RE: per router one count an expert, ragged. Columns are experts; where they are more than fit into `width`,
    neighbours share one, which shows their mean, or x when one of them is dead.
    """
    shades = SHADES if unicode else ASCII_SHADES
    label = max(map(len, names), default=0)
    tails = [f"max {max(row) / _mean(row):.2f}x" + (f"  dead {dead}" if (dead := sum(n == 0 for n in row)) else "")
             for row in counts_RE]
    room = max(8, width - label - max(map(len, tails), default=0) - 4)
    widest = max(map(len, counts_RE), default=1)
    together, cell = -(-widest // room), max(1, min(3, room // widest))
    lines = [f"tokens per expert:  {shades[0]} near 0  {shades[4]} mean  {shades[-1]} twice the mean  {DEAD} no tokens"
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
    """Seconds left: the recent median of step times, plus what evaluations and saves took per step so far."""

    def __init__(self, recent: int = 50) -> None:
        self._times: deque[float] = deque(maxlen=recent)
        self._first: float | None = None                         # when the first step ended; start-up does not count
        self._last, self._inside, self._steps = 0.0, 0.0, 0

    def add(self, step_s: float, now: float) -> None:
        """A step of this length has just ended."""
        self._times.append(step_s)
        self._last = now
        if self._first is None:
            self._first = now
        else:
            self._inside += step_s
            self._steps += 1

    def seconds(self, remaining: int) -> float | None:
        if not self._times:
            return None
        beside = max(0.0, self._last - (self._first or 0.0) - self._inside) / max(1, self._steps)
        return remaining * (statistics.median(self._times) + beside)


class Console:
    """Everything a run says, on rank 0; other ranks are silent.

    steps: length of the schedule. last: where this process stops, `steps` when None.
    interval: a step line every so many steps, about those since the last one. progress: a bar, if the stream is a terminal.

    A context manager: leaving it takes the bar away and gives the logger back.
    """

    def __init__(self, *, rank: int, steps: int, last: int | None = None, interval: int = 1,
                 progress: bool = True, stream: TextIO | None = None) -> None:
        self.silent = rank != 0
        self.stream = stream or sys.stdout
        self.terminal = self.stream.isatty() and os.environ.get("TERM") != "dumb"
        self.unicode = can_show(SHADES, self.stream)
        self._steps, self._start, self._last, self._interval = steps, 0, steps if last is None else last, interval
        self._with_bar, self._bar, self._eta = progress and self.terminal and not self.silent, None, Eta()
        self._means = StepMeans()
        self._restore_logging = connect_logging(None if self.silent else self.line)

    def banner(self, rows: Sequence[tuple[str, str]]) -> None:
        self.line(banner(rows))

    def resume_at(self, step: int) -> None:
        """Steps taken before this process started."""
        self._start = step

    def step(self, metrics: Mapping[str, float]) -> None:
        """Call it after every step; a line appears when it is due."""
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
        """Tokens per expert by router."""
        if counts and not self.silent:
            self.line(heatmap([list(row) for row in counts.values()], list(counts), self.width, unicode=self.unicode))

    def summary(self, rows: Sequence[tuple[str, str]], commands: Sequence[str] = ()) -> None:
        self._stop_bar()
        self.line(summary(rows, commands))

    def line(self, text: str) -> None:
        """One or several lines, above the bar where there is one. What does not print is escaped."""
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
        return shutil.get_terminal_size((120, 24)).columns if self.terminal else 120

    def close(self) -> None:
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
        self._bar.update(self._bar.task_ids[0], completed=step, loss=part("loss {:.3f}", metrics.get("loss/ce")),
                         eta=part("eta {}", eta_s, duration))

    def _stop_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def connect_logging(write: Callable[[str], None] | None) -> Callable[[], None]:
    """Hand what the logger `moetrain` says, from INFO up, to `write` as tagged lines; None: to nobody.

    Returns a function that undoes it.
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
    """[warn] in front of warnings, [error] of errors; a message that brings its own tag keeps it.

    Paths and texts that a message is given stay on its line, whatever they hold.
    """

    def format(self, record: logging.LogRecord) -> str:
        if isinstance(record.args, tuple):
            record = logging.makeLogRecord({**record.__dict__, "args": tuple(
                shown(value) if isinstance(value, (str, os.PathLike)) else value for value in record.args)})
        text = super().format(record)
        tag = "[error] " if record.levelno >= logging.ERROR else "[warn] " if record.levelno >= logging.WARNING else ""
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
    try:
        text.encode(_encoding(stream))
        return True
    except (UnicodeEncodeError, LookupError):
        return False


def _encoding(stream: TextIO) -> str:
    return getattr(stream, "encoding", None) or "ascii"


def _make_bar(stream: TextIO) -> Any:
    """A progress bar that leaves no trace; rich honours NO_COLOR itself."""
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
