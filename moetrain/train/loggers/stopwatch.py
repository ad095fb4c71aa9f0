"""Time of a step: its phases on this rank, the range of each over ranks, and a warning when it varies.

    Stopwatch       seconds of the phases of a step on this rank
    rank_metrics    fastest and slowest rank of each phase
    Unsteady        warning about steps that vary, or processes that compete for cores
"""

import logging
import os
import resource
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch

PHASES = ("data", "forward", "backward", "optim")

log = logging.getLogger(__name__)


class Stopwatch:
    """Seconds of the phases of a step, by name; laps of the same name add up.

    On a GPU a lap is the time between two CUDA events, for which the host never waits: `settle` reads the
    events after the step has copied its sums to the host. The update of parameters comes after that, so its
    lap is counted with the next step.

    Args:
        device: device whose time is measured; its events on CUDA, the host's clock otherwise.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.laps: dict[str, float] = {}
        self._marks: list[tuple[str, Mark]] = []             # not yet read, oldest first
        self._now: Callable[[], Mark] = _event if device.type == "cuda" else time.perf_counter
        self.restart()

    def restart(self) -> None:
        """Begin a step. Time between steps is not counted."""
        self.before = self.laps
        if self.device.type != "cuda":
            self.laps, self._marks = {}, []
        self._mark("")

    def lap(self, name: str) -> None:
        """End a phase: the time since the previous lap belongs to `name`."""
        self._mark(name)
        if self.device.type != "cuda":
            self._read()

    def settle(self) -> None:
        """Read the events of the step. Call it once the device has reached all of them."""
        if self.device.type == "cuda":
            self.laps = {f"time/{phase}": 0.0 for phase in PHASES}
            self._read()

    def total(self) -> float:
        """Seconds of all phases together."""
        return sum(self.laps.values())

    def phases(self) -> list[float]:
        """Seconds of each phase in PHASES, in this step.

        A phase that is not measured yet has the value of the previous step, or 0 in the first step.
        """
        laps = self.before | self.laps
        return [laps.get(f"time/{phase}", 0.0) for phase in PHASES]

    def _mark(self, name: str) -> None:
        self._marks.append((name, self._now()))

    def _read(self) -> None:
        """Add the seconds between neighboring marks to their laps. The last mark begins the next lap."""
        for (_, begin), (name, end) in zip(self._marks, self._marks[1:]):
            if name:
                self.laps[f"time/{name}"] = self.laps.get(f"time/{name}", 0.0) + _between(begin, end)
        self._marks = self._marks[-1:]


Mark: TypeAlias = float | torch.Event


def _event() -> torch.Event:
    """Record a CUDA event with timing in the current stream."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(begin: Mark, end: Mark) -> float:
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1e3


def rank_metrics(phases: Sequence[Sequence[float]]) -> dict[str, float]:
    """Metrics of the fastest and slowest rank of each phase; none for a run of one rank.

    Args:
        phases: `Stopwatch.phases` of every rank, in the order of ranks.

    Returns:
        `time/<phase>/min` and `time/<phase>/max` in seconds, and `time/slowest_rank`.
    """
    if len(phases) == 1:
        return {}
    metrics: dict[str, float] = {}
    for phase, seconds in zip(PHASES, zip(*phases)):
        metrics |= {f"time/{phase}/min": min(seconds), f"time/{phase}/max": max(seconds)}
    # Without optim, in which the ranks wait for each other.
    own = [sum(seconds[:-1]) for seconds in phases]
    return {**metrics, "time/slowest_rank": own.index(max(own))}


class Unsteady:
    """One warning about steps that take too long: their times vary, or other processes take the cores.

    The operating system counts the second cause: involuntary context switches, which take a core from a
    thread that could continue. With a core for every thread they come a few times a second. Threads that
    share cores are switched a hundred times a second, and all threads of an operator wait for the slowest.

    The RECENT last steps are compared. The first ones are left out, because they allocate and connect.

    Args:
        device: device of the run, for the advice.
    """

    FIRST, RECENT = 5, 30
    FACTOR = 3.0                   # of the slowest to the fastest decile of step times
    PREEMPTIONS = 40.0             # a second; 80 to 130 were seen where ten processes share two cores

    def __init__(self, device: torch.device) -> None:
        self.device, self.seen, self.told = device, 0, False
        self.times: deque[float] = deque(maxlen=self.RECENT)
        self.preempted: deque[int] = deque(maxlen=self.RECENT + 1)

    def add(self, seconds: float) -> None:
        """Take the seconds of a step, and warn if steps are unsteady."""
        self.seen += 1
        if self.told or self.seen < self.FIRST:
            return
        self.preempted.append(preemptions())
        if self.seen > self.FIRST:
            self.times.append(seconds)
        if len(self.times) == self.RECENT and (cause := self._cause()):
            self.told = True
            log.warning("%s; %s. docs/howto/slow.md says how to find out more", cause, self._advice())

    def _cause(self) -> str:
        tenths = statistics.quantiles(self.times, n=10)
        if tenths[-1] > self.FACTOR * tenths[0]:
            return (f"of the last {self.RECENT} steps a tenth took more than {tenths[-1]:.3g} s "
                    f"and a tenth less than {tenths[0]:.3g} s")
        rate = (self.preempted[-1] - self.preempted[0]) / max(sum(self.times), 1e-9)
        if rate > self.PREEMPTIONS:
            return f"other processes took a core from this one {rate:.0f} times a second"
        return ""

    def _advice(self) -> str:
        threads = torch.get_num_threads()
        if self.device.type == "cpu" and threads > 1:
            return (f"its {threads} threads wait for the slowest of them: stop the others, or resume with "
                    f"OMP_NUM_THREADS={threads // 2} before the command")
        return f"look for other processes on the {len(os.sched_getaffinity(0))} cores that it may use"


def preemptions() -> int:
    """Involuntary context switches of this process so far, over all its threads."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
