"""Where the time of a step goes: phases on this rank, the fastest and the slowest rank of each, and steps that vary."""

import logging
import os
import resource
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch

PHASES = ("data", "forward", "backward", "optim")

log = logging.getLogger(__name__)


class Stopwatch:
    """Seconds of the phases of a step, by name; laps of one name add up.

    On a GPU a lap is what passed there between two events, and the host never waits for it: `settle` reads the events once
    the step has read its sums. The update comes after that, so its lap is counted with the next step.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.laps: dict[str, float] = {}
        self._marks: list[tuple[str, Mark]] = []             # since the last that were read, oldest first
        self._now: Callable[[], Mark] = _event if device.type == "cuda" else time.perf_counter
        self.restart()

    def restart(self) -> None:
        """A step begins. What passes between steps belongs to none."""
        self.before = self.laps
        if self.device.type != "cuda":
            self.laps, self._marks = {}, []
        self._mark("")

    def lap(self, name: str) -> None:
        """What passed since the last lap was `name`."""
        self._mark(name)
        if self.device.type != "cuda":
            self._read()

    def settle(self) -> None:
        """The device has done all that was marked."""
        if self.device.type == "cuda":
            self.laps = {f"time/{phase}": 0.0 for phase in PHASES}
            self._read()

    def total(self) -> float:
        """Seconds of all phases."""
        return sum(self.laps.values())

    def phases(self) -> list[float]:
        """Of this step, as far as it is known; a phase that is not yet as it was in the step before, 0 in the first."""
        laps = self.before | self.laps
        return [laps.get(f"time/{phase}", 0.0) for phase in PHASES]

    def _mark(self, name: str) -> None:
        self._marks.append((name, self._now()))

    def _read(self) -> None:
        """Seconds between neighbouring marks. The last mark stays, as the beginning of what comes."""
        for (_, begin), (name, end) in zip(self._marks, self._marks[1:]):
            if name:
                self.laps[f"time/{name}"] = self.laps.get(f"time/{name}", 0.0) + _between(begin, end)
        self._marks = self._marks[-1:]


Mark = float | torch.Event


def _event() -> torch.Event:
    """A place in the current stream that remembers when it was reached."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(begin: Mark, end: Mark) -> float:
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1e3


def rank_metrics(phases: Sequence[Sequence[float]]) -> dict[str, float]:
    """Fastest and slowest rank of each phase; nothing of one rank alone. phases: of every rank, `Stopwatch.phases`."""
    if len(phases) == 1:
        return {}
    metrics: dict[str, float] = {}
    for phase, seconds in zip(PHASES, zip(*phases)):
        metrics |= {f"time/{phase}/min": min(seconds), f"time/{phase}/max": max(seconds)}
    own = [sum(seconds[:-1]) for seconds in phases]          # without optim, which ends when all ranks are there
    return {**metrics, "time/slowest_rank": own.index(max(own))}


class Unsteady:
    """Warns once when steps take longer than they need: their times differ much, or other processes take the cores.

    The second is counted by the system: how often it took a core from a thread of this process that wanted to go on. With a
    core for every thread that is a few times a second; threads that share cores lose them a hundred times, and all threads of
    an operator wait for the slowest. Looks at RECENT steps, after the first ones, which allocate and connect.
    """

    FIRST, RECENT = 5, 30
    FACTOR = 3.0                             # between the slow and the fast tenth of the steps
    PREEMPTIONS = 40.0                       # a second; 80 to 130 were seen where ten processes share two cores

    def __init__(self, device: torch.device) -> None:
        self.device, self.seen, self.told = device, 0, False
        self.times: deque[float] = deque(maxlen=self.RECENT)
        self.preempted: deque[int] = deque(maxlen=self.RECENT + 1)

    def add(self, seconds: float) -> None:
        """A step took so long."""
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
            return (f"of the last {self.RECENT} steps a tenth took more than {tenths[-1]:.3g} s and a tenth less than "
                    f"{tenths[0]:.3g} s")
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
    """How often the system has taken a core from a thread of this process that wanted to go on."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
