"""run.dtype=auto: the run's own, bfloat16 where a GPU computes it, float32 elsewhere. The decision alone: no GPU here."""

from pathlib import Path

import pytest

from moetrain.config.compose import compose, from_yaml, resume_conflicts
from moetrain.plan.precision import choose_dtype
from moetrain.train.loop import train


@pytest.mark.parametrize("asked, device, computes, recorded, chosen", [
    ("auto", "cuda", True, None, "bfloat16"), ("auto", "cuda", False, None, "float32"), ("auto", "cpu", True, None, "float32"),
    ("auto", "cuda", True, "float32", "float32"), ("auto", "cpu", True, "bfloat16", "bfloat16"), ("auto", "cpu", True, "float64", "float64"),
    ("float32", "cuda", True, None, "float32"), ("bfloat16", "cpu", True, None, "bfloat16"), ("float64", "cuda", True, None, "float64")])
def test_auto_is_the_runs_own_or_what_the_device_computes(asked: str, device: str, computes: bool, recorded: str | None, chosen: str) -> None:
    assert choose_dtype(asked, device, computes_bfloat16=computes, recorded=recorded) == chosen


def test_a_run_that_goes_on_may_leave_its_dtype_open_but_not_change_it() -> None:
    trained = compose(["run.dtype=bfloat16"])
    assert resume_conflicts(trained, compose([])) == []
    assert [error.where for error in resume_conflicts(trained, compose(["run.dtype=float32"]))] == ["run.dtype"]


def test_a_run_records_its_dtype_and_keeps_it(tmp_path: Path) -> None:
    """On a CPU `auto` begins in float32; a run that was begun in bfloat16 goes on in it."""
    words = ["experiment=debug", "log.wandb=off", "eval.windows=1", "model.dim=32", "train.seq_len=16", "run.device=cpu", "run.steps=2"]
    for dtype, begun in (("float32", "auto"), ("bfloat16", "bfloat16")):
        run = [*words, f"run.dir={tmp_path / dtype}"]
        train(compose([*run, f"run.dtype={begun}", "run.stop_at=1"]))
        assert from_yaml(tmp_path / dtype / "config.yaml").run.dtype == dtype
        train(compose(run))
        assert from_yaml(tmp_path / dtype / "config.yaml").run.dtype == dtype
