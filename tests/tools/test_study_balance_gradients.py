"""The study of balance gradients: ours is the true one, and known defects of others show where they are."""

import sys

import pytest

from tests.support import needs
from tools.study import balance_gradients as compare_balance
from tools.study.balance_gradients import SPLITS, TRAINERS, compare


@pytest.fixture(scope="module")
def found():
    needs.module("transformers", extra="hf")
    return compare(seed=1)


def of(found, name: str, batch: str, split: tuple[int, int]) -> tuple[float, float]:
    return found[next(full for full in TRAINERS if full.startswith(name)), batch, split]


def test_ours_is_exact_for_every_split(found):
    for batch in compare_balance.BATCHES:
        for split in SPLITS:
            assert of(found, "moetrain, `balance=global`", batch, split)[0] < 1e-12, (batch, split)


def test_without_a_split_and_padding_everyone_but_transformers_agrees(found):
    for name in TRAINERS:
        assert (of(found, name, "full", (1, 1))[0] < 1e-6) == ("transformers" not in name), name


def test_twins_agree_where_no_defect_is(found):
    """What others compute by their own formula is a mode of ours, but for what the page says."""
    for ours, theirs, batches in (
            ("moetrain, `balance=micro`", "Megatron-LM, `aux_loss`, per-token", ("full", "padded")),
            ("moetrain, `balance=micro`", "OLMo-core", ("full",)),
            ("moetrain, `balance.mode=sync`", "XTuner, global", ("full",))):
        for batch in batches:
            for split in SPLITS:
                expected = pytest.approx(of(found, theirs, batch, split), rel=1e-9, abs=1e-12)
                assert of(found, ours, batch, split) == expected
    buffered = of(found, "moetrain, `balance.mode=buffer`", "full", (1, 4))
    assert of(found, "Megatron-LM, `global", "full", (1, 4)) == pytest.approx(buffered)


def test_the_scale_of_others_depends_on_the_split(found):
    alone = of(found, "transformers", "alike", (1, 1))[1]
    for ranks, turns in SPLITS:
        assert of(found, "Megatron-LM, `global", "alike", (ranks, turns))[1] == pytest.approx(1 / ranks)
        scale = of(found, "transformers", "alike", (ranks, turns))[1]
        assert scale == pytest.approx(alone * ranks * turns, rel=1e-5)
    assert of(found, "OLMo-core", "padded", (1, 1))[0] > 0.1


def test_the_page_is_written(tmp_path, monkeypatch):
    needs.module("transformers", extra="hf")
    monkeypatch.setattr(sys, "argv", ["balance_gradients", "--out", str(tmp_path / "page.md")])
    compare_balance.main()
    rows = [line for line in (tmp_path / "page.md").read_text().splitlines()
            if line.startswith("| moetrain, `balance=global`")]
    assert len(rows) == 3 and all(row.count("0 (1)") == len(SPLITS) for row in rows)
