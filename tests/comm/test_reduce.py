"""Sums that fail, and work that one rank does while the others wait for it, over real ranks."""

import datetime
import time

import pytest
import torch
import torch.distributed as dist

from moetrain.comm.agreement import on_first
from moetrain.comm.mesh import Group
from moetrain.comm.reduce import sum_over_async
from moetrain.errors import DataError

PATIENCE_S, WORK_S = 2, 4


def impatient(size: int) -> Group:
    """All ranks, with collectives that wait for less time than the work takes."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=PATIENCE_S))
    return Group("batch", tuple(range(size)), dist.get_rank(), group)


def works_long(size: int) -> int | None:
    group = impatient(size)

    def work() -> int:
        time.sleep(WORK_S)
        return 7

    return on_first(group, work)


def fails(size: int) -> str:
    def work() -> None:
        raise DataError(1, "what", where="where", why="why", next="next")

    try:
        on_first(impatient(size), work)
    except DataError as error:
        return error.id
    except SystemExit as left:
        return f"left with {left.code}"
    return "went on"


def test_others_wait_longer_than_a_collective_may(ranks):
    assert ranks(2).run(works_long, 2) == [7, None]


def test_what_fails_alone_ends_all(ranks):
    assert ranks(2).run(fails, 2) == ["E-DATA-001", "left with 12"]


def test_alone_there_is_nobody_to_wait_for():
    assert on_first(Group("batch", (0,), 0), lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        on_first(Group("batch", (0,), 0), lambda: 1 / 0)


def test_a_sum_whose_wait_failed_fails_again(monkeypatch):
    """It never gives what only this rank had."""
    class Gone:
        def wait(self) -> None:
            raise RuntimeError("a rank is gone")

    monkeypatch.setattr("torch.distributed.all_reduce", lambda *arguments, **named: Gone())
    wait = sum_over_async(Group("batch", (0, 1), 0, object()), torch.ones(1))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="gone"):
            wait()
