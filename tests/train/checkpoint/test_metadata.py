"""Warnings about the steps that are left.

A warm-up that is too long, a schedule that another run.steps stretches, data in another order.
"""

from dataclasses import replace
from pathlib import Path

import pytest

from moetrain.__main__ import main
from moetrain.config.schema import OptimConfig
from moetrain.data.batches.synthetic import SyntheticDataset
from moetrain.train.optim.lr_schedule import learning_rate, resumed_rate, schedule_warning

COSINE = OptimConfig(schedule="cosine", lr=1e-3, warmup=10, min_lr_ratio=0.1)
WSD = replace(COSINE, schedule="wsd", decay=0.5)
TINY = ["experiment=debug", "model.num_layers=1", "model.dim=16", "model.expert_dim=16", "eval.windows=1",
        "log.progress=false",
        "checkpoint.async_save=false"]


@pytest.mark.parametrize("optim, steps, said", [
    (replace(COSINE, warmup=1000), 4, "reaches 4e-06 of optim.lr=0.001"),
    (replace(WSD, warmup=1000), 4, "reaches 4e-06 of optim.lr=0.001"),
    (replace(WSD, warmup=60), 100, "shortened to 40 steps: the rate reaches 0.001"), (COSINE, 100, None),
    (WSD, 100, None), (replace(COSINE, warmup=0), 1, None), (replace(COSINE, warmup=10), 10, None)])
def test_a_warm_up_in_the_way_is_said_with_the_largest_rate(
        optim: OptimConfig, steps: int, said: str | None) -> None:
    warning = schedule_warning(steps, optim)
    assert (warning is None) == (said is None) and (said or "") in (warning or "")
    largest = max(learning_rate(step, steps, optim) for step in range(1, steps + 1))
    assert warning is None or f"the rate reaches {largest:.3g} " in warning


def test_another_length_says_what_becomes_of_the_rate() -> None:
    assert resumed_rate(101, 100, 100, WSD) is None
    # Up to there both are the same
    assert "step 51 is 0.001, where it was 0.000982" in resumed_rate(21, 100, 200, WSD)
    for optim in (COSINE, WSD):
        said = resumed_rate(101, 100, 200, optim)
        assert ("was 100 and is 200" in said and f"is {learning_rate(101, 200, optim):.3g}" in said
                and "was 0.0001" in said)


def test_a_run_says_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                            capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    grows = ["optim.warmup=5", "router=fixed_random"]
    assert main(["train", *TINY, "run.steps=2", *grows]) == 0
    first = capsys.readouterr().out
    assert (first.count("[warn] optim.warmup=5 is longer than run.steps=2") == 1
            and "run.steps was" not in first)
    assert main(["train", *TINY, "run.steps=8", *grows]) == 0
    resumed = capsys.readouterr().out
    assert resumed.count("run.steps was 2 and is 8") == 2 and "order" not in resumed
    assert "of step 3 has 1 experts, where it had 2; router.growth_steps=2 keeps" in resumed
    monkeypatch.setattr(SyntheticDataset, "order", "numbers-0")
    assert main(["train", *TINY, "run.steps=9", *grows, "router.growth_steps=8"]) == 0
    again = capsys.readouterr().out
    assert "router.growth_steps" not in again and again.count(
        "[warn] the steps up to 8 have read the data in the order of another release") == 1
