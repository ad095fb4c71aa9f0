"""Table of the time that phases and operators took in recorded steps, from log/timeline.

    phase       a named range of the step, with all that runs inside it: forward, backward, layers.0.moe, ...
    operator    its own time, without the operators that it calls; those of other threads, such as gloo's,
                are counted

Times are means over steps and ranks; shares are of the step on the training thread.
train/loggers/timeline.py records the steps.
"""

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from moetrain.files import nearby, read_json, reason, shown
from moetrain.report.output import write_csv

MAX_BYTES = 1 << 30  # size limit of the record of one rank and step
PHASE_CATEGORIES = ("user_annotation", "gpu_user_annotation")
OPERATOR_CATEGORIES = ("cpu_op", "kernel", "gpu_memcpy", "gpu_memset")
MAX_OPERATORS = 20

log = logging.getLogger(__name__)


class Row(NamedTuple):
    """Time of one phase or operator in a step."""

    kind: str       # phase or operator
    name: str
    calls: float    # in a step of a rank, mean
    seconds: float  # in a step of a rank, mean
    fastest: float  # seconds on the fastest rank
    slowest: float  # seconds on the slowest rank
    share: float    # of the step


class Event(NamedTuple):
    """One event of a recorded step; times are in microseconds."""

    category: str
    name: str
    thread: tuple[object, object]  # process and thread
    begin: float
    end: float


def summarize(run_dir: Path) -> list[Row]:
    """Compute the table of a run and write report/timeline.csv.

    Returns:
        Phases, then operators, the longest first; empty where no step was recorded.
    """
    paths = sorted((run_dir / "log" / "timeline").glob("step-*/rank-*.json"))
    by_rank: dict[str, list[list[Event]]] = defaultdict(list)
    for path in paths:
        try:
            by_rank[path.stem].append(read_events(path))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s cannot be read and is left out: %s", nearby(path), reason(error))
    rows = table(list(by_rank.values()))
    if rows:
        write_csv(run_dir / "report" / "timeline.csv", [
            ["kind", "name", "calls", "seconds", "fastest rank", "slowest rank", "share"],
            *([row.kind, shown(row.name), f"{row.calls:g}", *(f"{value:.6g}" for value in row[3:])]
              for row in rows)])
    return rows


def read_events(path: Path) -> list[Event]:
    """Read the complete events from the record of one rank and step."""
    return [Event(str(event.get("cat")), str(event["name"]), (event.get("pid"), event.get("tid")),
                  float(event["ts"]), float(event["ts"]) + float(event["dur"]))
            for event in read_json(path, limit=MAX_BYTES)["traceEvents"] if event.get("ph") == "X"]


def table(ranks: Sequence[Sequence[list[Event]]]) -> list[Row]:
    """Compute the rows of the table from the events of every rank and recorded step."""
    seconds: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    calls: dict[tuple[str, str], float] = defaultdict(float)
    steps, whole = sum(map(len, ranks)), 0.0
    for rank, recorded in enumerate(ranks):
        for events in recorded:
            phases = [event for event in events if event.category in PHASE_CATEGORIES]
            whole += max((e.end for e in phases), default=0.0) - min((e.begin for e in phases), default=0.0)
            own = own_times(event for event in events if event.category in OPERATOR_CATEGORIES)
            phase_times = [("phase", event.name, event.end - event.begin) for event in phases]
            for kind, name, duration in [*phase_times, *(("operator", *entry) for entry in own)]:
                seconds[kind, name][rank] = (seconds[kind, name].get(rank, 0.0)
                                             + duration / len(recorded) / 1e6)
                calls[kind, name] += 1 / steps
    rows = []
    for (kind, name), by_rank in seconds.items():
        values = [by_rank.get(rank, 0.0) for rank in range(len(ranks))]
        mean = sum(values) / len(values)
        share = mean * 1e6 * steps / whole if whole else 0.0
        rows.append(Row(kind, name, calls[kind, name], mean, min(values), max(values), share))
    return sorted(rows, key=lambda row: (row.kind != "phase", -row.seconds))


def own_times(events: Iterable[Event]) -> list[tuple[str, float]]:
    """Compute (name, microseconds) of every event, without the events that run inside it."""
    found: list[list] = []
    open_on: dict[tuple[object, object], list[tuple[float, int]]] = defaultdict(list)
    for event in sorted(events, key=lambda event: (event.begin, -event.end)):
        stack = open_on[event.thread]
        while stack and stack[-1][0] <= event.begin:
            stack.pop()
        if stack:
            found[stack[-1][1]][1] -= event.end - event.begin
        stack.append((event.end, len(found)))
        found.append([event.name, event.end - event.begin])
    return [(name, duration) for name, duration in found]


def text(rows: Sequence[Row]) -> str:
    """Format the table for a terminal: all phases, and the operators that take the most time."""
    operators = [row for row in rows if row.kind == "operator"]
    lines = [["of a recorded step", "calls", "ms", "fastest", "slowest", "share"]]
    for row in [*(row for row in rows if row.kind == "phase"), *operators[:MAX_OPERATORS]]:
        if row.kind == "operator" and len(lines[-1]) > 1 and row is operators[0]:
            lines.append(["operators, without what they call", "", "", "", "", ""])
        lines.append([shown(row.name, most=44), f"{row.calls:.0f}",
                      *(f"{value * 1e3:.2f}" for value in row[3:6]), f"{row.share:.1%}"])
    first, *others = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join([name.ljust(first), *map(str.rjust, cells, others)]).rstrip()
                     for name, *cells in lines)
