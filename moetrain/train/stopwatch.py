"""Where the time of a step goes: phases on this rank, the fastest and the slowest rank of each, and steps that vary."""

import logging
import os
import statistics
import time
from collections import deque
from collections.abc import Sequence

import torch

PHASES = ("data", "forward", "backward", "optim")

log = logging.getLogger(__name__)


class Stopwatch:
    """Seconds between laps, by name; laps of one name add up. Waits for the GPU, so that a lap is what it cost."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.laps: dict[str, float] = {}
        self.restart()

    def restart(self) -> None:
        """A step begins."""
        self.before, self.laps = self.laps, {}
        self.start = self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        """What passed since the last lap was `name`."""
        now = self._now()
        self.laps[f"time/{name}"] = self.laps.get(f"time/{name}", 0.0) + now - self.last
        self.last = now

    def total(self) -> float:
        """Seconds since the step began."""
        return self._now() - self.start

    def phases(self) -> list[float]:
        """Of this step, as far as it has come; a phase that is still to come as it was in the step before, 0 in the first."""
        laps = self.before | self.laps
        return [laps.get(f"time/{phase}", 0.0) for phase in PHASES]

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def rank_metrics(phases: Sequence[Sequence[float]]) -> dict[str, float]:
    """Fastest and slowest rank of each phase. phases: of every rank, from `Stopwatch.phases`. Nothing to say of one rank."""
    if len(phases) == 1:
        return {}
    metrics: dict[str, float] = {}
    for phase, seconds in zip(PHASES, zip(*phases)):
        metrics |= {f"time/{phase}/min": min(seconds), f"time/{phase}/max": max(seconds)}
    own = [sum(seconds[:-1]) for seconds in phases]          # without optim, which ends when all ranks are there
    return {**metrics, "time/slowest_rank": own.index(max(own))}


class Unsteady:
    """Warns once when the times of steps differ much: on a CPU mostly more threads than free cores.

    Looks at the last RECENT steps, once there are so many beyond the first, which allocate and connect.
    """

    FIRST, RECENT, FACTOR = 5, 30, 3.0       # a step is rarely twice as long as another on a machine of one's own

    def __init__(self, device: torch.device) -> None:
        self.device, self.seen, self.told = device, 0, False
        self.times: deque[float] = deque(maxlen=self.RECENT)

    def add(self, seconds: float) -> None:
        """A step took so long."""
        self.seen += 1
        if self.told or self.seen <= self.FIRST:
            return
        self.times.append(seconds)
        if len(self.times) < self.RECENT:
            return
        tenths = statistics.quantiles(self.times, n=10)
        if tenths[-1] > self.FACTOR * tenths[0]:
            self.told = True
            log.warning("of the last %d steps a tenth took more than %.3g s and a tenth less than %.3g s: %s; docs/howto/slow.md says how to find the cause",
                        self.RECENT, tenths[-1], tenths[0], self._advice())

    def _advice(self) -> str:
        threads = torch.get_num_threads()
        if self.device.type == "cpu" and threads > 1:
            return (f"{threads} threads wait for each other where other programs use some of the {len(os.sched_getaffinity(0))} cores; "
                    f"stop them, or resume with OMP_NUM_THREADS={threads // 2} before the command")
        return "another program may be using this machine"
