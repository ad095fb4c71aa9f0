"""Phases of a step by rank, and the warning about steps that vary."""

import itertools
import logging
import os
import subprocess
import sys
import time

import pytest
import torch

from moetrain.train.loggers import stopwatch
from moetrain.train.loggers.stopwatch import PHASES, Stopwatch, Unsteady, rank_metrics


def test_a_phase_that_is_still_to_come_is_that_of_the_step_before() -> None:
    watch = Stopwatch(torch.device("cpu"))
    watch.laps = {"time/data": 1.0, "time/forward": 2.0, "time/backward": 3.0, "time/optim": 4.0}
    watch.restart()
    watch.laps["time/data"] = 5.0
    assert watch.phases() == [5.0, 2.0, 3.0, 4.0] and len(PHASES) == 4
    assert Stopwatch(torch.device("cpu")).phases() == [0.0] * 4


def test_ranks_are_compared_by_phase() -> None:
    found = rank_metrics([[1.0, 2.0, 3.0, 9.0], [2.0, 2.5, 3.0, 1.0], [1.5, 2.0, 3.0, 1.0]])
    assert found["time/data/min"] == 1.0 and found["time/data/max"] == 2.0 and found["time/optim/max"] == 9.0
    assert found["time/slowest_rank"] == 1               # waiting in optim does not count
    assert rank_metrics([[1.0] * 4]) == {}


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("moetrain"), "propagate", True)
    return caplog


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose cores nobody else wants."""
    monkeypatch.setattr(stopwatch, "preemptions", lambda: 7)


@pytest.mark.parametrize("threads, advice", [(4, "OMP_NUM_THREADS=2"), (1, "look for other processes")])
def test_steps_that_vary_are_told_once(quiet: None, heard: pytest.LogCaptureFixture,
                                       monkeypatch: pytest.MonkeyPatch, threads: int,
                                       advice: str) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    watched = Unsteady(torch.device("cpu"))
    for step in range(200):
        watched.add(0.155 if step % 4 == 0 else 0.02)
    assert (len(heard.records) == 1 and advice in heard.text and "0.155 s" in heard.text
            and "docs/howto/slow.md" in heard.text)


def test_an_ordinary_run_is_not_warned(quiet: None, heard: pytest.LogCaptureFixture) -> None:
    watched = Unsteady(torch.device("cpu"))
    # A slow start, and now and then a step that waits for a save
    for step in range(200):
        watched.add(2.0 if step < 5 or step % 40 == 0 else 0.02 + 0.0002 * (step % 50))
    assert not heard.records


def test_cores_that_others_take_are_told_once(heard: pytest.LogCaptureFixture,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that are slow alike: 155 ms for 20."""
    counts = itertools.count(1000, 15)
    monkeypatch.setattr(stopwatch, "preemptions", lambda: next(counts))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    watched = Unsteady(torch.device("cpu"))
    for _ in range(100):
        watched.add(0.155)
    assert len(heard.records) == 1 and "97 times a second" in heard.text and "OMP_NUM_THREADS=1" in heard.text


def test_preemptions_are_counted_by_the_system() -> None:
    before = stopwatch.preemptions()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        core = min(os.sched_getaffinity(0))
        allowed = os.sched_getaffinity(0)
        os.sched_setaffinity(busy.pid, {core})
        os.sched_setaffinity(0, {core})
        try:
            until = time.thread_time() + 0.3
            while time.thread_time() < until:
                pass
        finally:
            os.sched_setaffinity(0, allowed)
            busy.kill()
    assert stopwatch.preemptions() > before + 5
