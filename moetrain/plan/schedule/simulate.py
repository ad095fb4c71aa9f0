"""Event simulator: when every task of a schedule begins and ends, on resources that do one thing at a time.

A task begins when all tasks that it comes after have ended and its resource is free. Of several tasks that
could begin on a resource, the one of the lowest rank begins; ties go to the first in the list. A task that
has begun is not interrupted, and no resource waits for a task of a lower rank that cannot begin yet. A
stream, whose tasks run in a fixed order, is written as tasks each of which comes after the one before.

A collective occupies a link that all ranks share here, so its time is that of the slowest rank.
"""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

BETWEEN, INSIDE, COMPUTE = "between nodes", "inside nodes", "compute"


class Task(NamedTuple):
    """Work that occupies a resource for a time.

    Attributes:
        name: what it is, for pictures.
        resource: what it occupies.
        seconds: for how long.
        after: indices of the tasks that must have ended.
        rank: which of several tasks begins first: the lowest.
    """

    name: str
    resource: str
    seconds: float
    after: tuple[int, ...] = ()
    rank: float = 0.0


class Timeline(NamedTuple):
    """When tasks run.

    Attributes:
        tasks: the tasks, as they were given.
        begin_s: when each begins, from 0.
        end_s: when each ends.
    """

    tasks: tuple[Task, ...]
    begin_s: tuple[float, ...]
    end_s: tuple[float, ...]

    @property
    def makespan_s(self) -> float:
        """When the last task ends."""
        return max(self.end_s, default=0.0)

    def busy_s(self, resource: str) -> float:
        """Seconds for which a resource is occupied."""
        return sum(task.seconds for task in self.tasks if task.resource == resource)

    def exposed_s(self, resource: str = COMPUTE) -> float:
        """Seconds in which a resource does nothing."""
        return self.makespan_s - self.busy_s(resource)


def simulate(tasks: Sequence[Task]) -> Timeline:
    """Run tasks on their resources.

    Args:
        tasks: a task comes after earlier tasks of the list only.
    """
    followers: list[list[int]] = [[] for _ in tasks]
    for index, task in enumerate(tasks):
        assert task.seconds >= 0 and all(0 <= before < index for before in task.after), (index, task)
        for before in task.after:
            followers[before].append(index)
    begin_s, end_s = [0.0] * len(tasks), [0.0] * len(tasks)
    left = [len(task.after) for task in tasks]               # tasks that each still waits for
    ready: dict[str, list[tuple[float, int]]] = {task.resource: [] for task in tasks}
    running: dict[str, int] = {}
    ends: list[tuple[float, int]] = []                       # of running tasks, soonest first
    now, freed = 0.0, [index for index, count in enumerate(left) if not count]
    while True:
        while freed:
            index = freed.pop()
            if tasks[index].seconds:
                heapq.heappush(ready[tasks[index].resource], (tasks[index].rank, index))
            else:                                            # takes no time, so it does not wait in line
                begin_s[index] = end_s[index] = now
                freed += _freed(followers[index], left)
        for resource, waiting in ready.items():
            if waiting and resource not in running:
                index = running[resource] = heapq.heappop(waiting)[1]
                begin_s[index], end_s[index] = now, now + tasks[index].seconds
                heapq.heappush(ends, (end_s[index], index))
        if not ends:
            return Timeline(tuple(tasks), tuple(begin_s), tuple(end_s))
        now = ends[0][0]
        while ends and ends[0][0] == now:                    # all that end now, before anything begins
            index = heapq.heappop(ends)[1]
            del running[tasks[index].resource]
            freed += _freed(followers[index], left)


def _freed(followers: Sequence[int], left: list[int]) -> list[int]:
    """Count down what followers of a task that has ended wait for; those that wait for nothing more."""
    for follower in followers:
        left[follower] -= 1
    return [follower for follower in followers if not left[follower]]


def critical_path_s(tasks: Sequence[Task]) -> float:
    """Seconds of the longest chain of tasks, each after the other, if resources were without limit."""
    ends_s: list[float] = []
    for task in tasks:
        ends_s.append(task.seconds + max((ends_s[before] for before in task.after), default=0.0))
    return max(ends_s, default=0.0)
