"""Saves by time beside those by steps: agreed by all ranks, never twice at a step."""

import re
from pathlib import Path

import pytest

from moetrain.config.compose import compose
from moetrain.config.schema import CheckpointConfig
from moetrain.train.checkpoint.save import Saver
from moetrain.train.loggers.banner import saves_line
from moetrain.train.loop import train
from moetrain.train.step import StepFlags, train_step
from tests.support.training import TINY, make_run


@pytest.mark.parametrize("minutes, interval, steps",
                         [("1e-9", 2, [1, 2, 3, 4, 5]), ("0", 2, [2, 4, 5]), ("null", 0, [5]),
                          ("15", 0, [5])])
def test_a_run_saves_by_time_and_by_steps_and_once_where_both_are_due(
        tmp_path, capsys, minutes, interval, steps):
    train(compose([*TINY, "model.num_layers=1", "run.steps=5", "checkpoint.keep=null",
                   "checkpoint.async_save=false", "eval.windows=1",
                   f"run.dir={tmp_path}", f"checkpoint.every_minutes={minutes}",
                   f"checkpoint.interval={interval}"]))
    assert [int(step) for step in re.findall(r"\[save\] step (\d+):", capsys.readouterr().out)] == steps
    assert [int(path.name[5:]) for path in sorted((tmp_path / "checkpoints").glob("step-*"))] == steps


def late_on_one_rank(directory: Path) -> tuple[int, int, int]:
    """(what this rank's clock says, what all ranks agree on, what the clock says after the save)"""
    run = make_run(["parallel=ddp", "train.micro_batch=8"])
    saver = Saver(directory, run.mesh, CheckpointConfig(every_minutes=15))
    saver.began -= 16 * 60 if run.mesh.rank == 1 else 14 * 60
    mine = saver.overdue()
    agreed = train_step(run, 1, StepFlags(save_overdue=mine)).flags.save_overdue
    saver.begin(run.state, {})
    assert saver.overdue() == 0                          # not while one is under way, however late
    saver.finish()
    return mine, agreed, saver.overdue()


@pytest.mark.ranks
def test_one_clock_is_enough_and_all_ranks_know(ranks, tmp_path):
    assert ranks(2).run(late_on_one_rank, tmp_path) == [(0, 1, 0), (1, 1, 0)]


@pytest.mark.parametrize("config, line", [
    (CheckpointConfig(), "every 15 minutes and at the end"),
    (CheckpointConfig(interval=50, every_minutes=2.5), "every 50 steps, every 2.5 minutes and at the end"),
    (CheckpointConfig(interval=50, every_minutes=0), "every 50 steps and at the end"),
    (CheckpointConfig(every_minutes=None), "at the end")])
def test_the_banner_says_when(config, line):
    assert saves_line(config) == line
