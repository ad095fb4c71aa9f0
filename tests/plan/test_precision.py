"""Dtype that run.dtype=auto stands for: the run's own, bfloat16 where a GPU computes it, float32 elsewhere.

No GPU takes part: the decision is a pure function.
"""

from pathlib import Path
from typing import NamedTuple

import pytest

from moetrain.config.compose import compose, from_yaml
from moetrain.config.resumed import resume_conflicts
from moetrain.plan.precision import choose_dtype
from moetrain.train.loop import train


class Case(NamedTuple):
    """What is asked for, where, and what is chosen."""

    chosen: str
    asked: str = "auto"
    device: str = "cuda"
    computes_bfloat16: bool = True
    recorded: str | None = None


@pytest.mark.parametrize("case", [
    Case("bfloat16"), Case("float32", computes_bfloat16=False), Case("float32", device="cpu"),
    Case("float32", recorded="float32"), Case("bfloat16", device="cpu", recorded="bfloat16"),
    Case("float64", device="cpu", recorded="float64"),
    Case("float32", asked="float32"), Case("bfloat16", asked="bfloat16", device="cpu"),
    Case("float64", asked="float64")], ids=str)
def test_auto_is_the_runs_own_or_what_the_device_computes(case: Case) -> None:
    assert choose_dtype(case.asked, case.device, computes_bfloat16=case.computes_bfloat16,
                        recorded=case.recorded) == case.chosen


def test_a_run_that_goes_on_may_leave_its_dtype_open_but_not_change_it() -> None:
    trained = compose(["run.dtype=bfloat16"])
    assert resume_conflicts(trained, compose([])) == []
    conflicts = resume_conflicts(trained, compose(["run.dtype=float32"]))
    assert [error.where for error in conflicts] == ["run.dtype"]


def test_a_run_records_its_dtype_and_keeps_it(tmp_path: Path) -> None:
    """On a CPU `auto` begins in float32; a run that was begun in bfloat16 goes on in it."""
    words = ["experiment=debug", "log.wandb=off", "eval.windows=1", "model.dim=32", "train.seq_len=16",
             "run.device=cpu", "run.steps=2"]
    for dtype, begun in (("float32", "auto"), ("bfloat16", "bfloat16")):
        run = [*words, f"run.dir={tmp_path / dtype}"]
        train(compose([*run, f"run.dtype={begun}", "run.stop_at=1"]))
        assert from_yaml(tmp_path / dtype / "config.yaml").run.dtype == dtype
        train(compose(run))
        assert from_yaml(tmp_path / dtype / "config.yaml").run.dtype == dtype
