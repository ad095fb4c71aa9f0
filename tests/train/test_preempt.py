"""Signals before the first step. What they do to whole runs: tests/integration/test_restart.py."""

import os
import signal

import pytest

from moetrain.train.preempt import SIGNALS, Preemption, told_early


class Signals:
    """What is raised while it goes is passed over, as in callbacks of imports."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def preemption() -> Preemption:
    return Preemption(grace_s=None, leaving=lambda code, reason: pytest.fail(reason))


def test_a_signal_while_a_run_starts_leaves_at_once():
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(SystemExit) as left, told_early():
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("it went on")
    assert left.value.code == 143 and [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_one_that_python_passed_over_leaves_before_the_first_step():
    reached = False
    with pytest.raises(SystemExit) as left, told_early():
        Signals()
        reached = True
        with preemption():
            pytest.fail("a step")
    assert reached and left.value.code == 143


def test_without_a_signal_the_first_step_comes():
    with told_early(), preemption() as told:
        assert told.requested is None
