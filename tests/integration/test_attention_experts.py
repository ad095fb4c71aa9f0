"""Attention experts with copies of them on other positions: two passes over a bank by one decision.

The shared test of all architectures (test_every_router.py) has every mesh, and no copies.
"""

from functools import cache

import pytest

from tests.support.random_copies import CALIBRATE, train_with_copies
from tests.support.training import Trained, alone, difference, union

STEPS = 4
WORDS = ["run.dtype=float64", "model.attention=experts", "model.num_attention_experts=6"]
CASES = [["train.activation_checkpointing=full", "parallel.rematerialize=true", "train.micro_batch=4"],
         ["parallel.rehome_interval=2", CALIBRATE, "train.micro_batch=8"]]


@cache
def truth() -> Trained:
    return alone(WORDS, STEPS)


@pytest.mark.ranks
@pytest.mark.parametrize("words", CASES, ids=["gathered again", "moving homes"])
def test_copies_of_attention_experts_train_as_one_process(ranks, words: list[str]) -> None:
    overrides = [*WORDS, *words, "parallel=fssdp", "run.nproc=2"]
    ours = union(ranks(2).run(train_with_copies, overrides, STEPS, None, 3, None))
    for what in ("gradients", "parameters"):
        error, name = difference(getattr(ours, what), getattr(truth(), what))
        assert error <= 1e-10, (what, name, error)
