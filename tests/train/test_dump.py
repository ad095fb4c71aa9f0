"""A dump of routers lets a stranger compute the step's numbers again: by the program in docs/reference/files.md, and for the loss
that was trained on by a second one below, which knows that page and nothing of the package."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file

from moetrain.train.step import train_step
from tests.integration.training import make_run

FILES = Path(__file__).parents[2] / "docs" / "reference" / "files.md"
WORDS = ["parallel=ep", "run.nproc=2", "train.micro_batch=4", "data.min_length=0.3", "run.dtype=float64", "loss.z.weight=0"]


def dumped(overrides: list[str], directory: Path, per_node: int = 2) -> list[tuple[dict[str, float], dict[str, list[int]]]]:
    """(metrics, counts) of four steps."""
    before, os.environ["LOCAL_WORLD_SIZE"] = os.environ["LOCAL_WORLD_SIZE"], str(per_node)
    try:
        run = make_run([*overrides, "log.router_dump=true"])
    finally:
        os.environ["LOCAL_WORLD_SIZE"] = before
    run.dump.directory = directory
    found = []
    for step in range(1, 5):
        result = train_step(run, step)
        run.dump.write(step)
        found.append((result.metrics, {name: counts.tolist() for name, counts in result.counts.items()}))
    return found


@pytest.mark.ranks
@pytest.mark.parametrize("overrides", [[], ["train.activation_checkpointing=full", "train.count_pass=true"]], ids=["kept", "recomputed"])
def test_a_stranger_computes_the_same_numbers(ranks, tmp_path, overrides):
    truth = ranks(2).run(dumped, [*WORDS, *overrides], tmp_path)[0]
    program = re.search(r"```python\n(.*?)```", FILES.read_text().split("## Router dumps")[1], re.DOTALL).group(1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:08d}" for step in (1, 2, 3)]
    for directory, (metrics, counts) in zip(sorted(tmp_path.iterdir()), truth):
        done = subprocess.run([sys.executable, "-c", program, str(directory)], capture_output=True, text=True, check=True)
        assert float(done.stdout) == pytest.approx(metrics["loss/balance"], rel=1e-12)
        ids = [ids for file in directory.iterdir() for name, ids in load_file(file).items() if name.endswith("layers.1.moe/ids")]
        assert len(ids) == 4 and [sum(int((part == expert).sum()) for part in ids) for expert in range(8)] == counts["layers.1.moe"]


# --- the loss that was trained on: f by scope and mode


class Part(NamedTuple):
    """One sequence as one router saw it; valid tokens only."""

    rank: int
    turn: int
    sequence: int
    counts_E: np.ndarray
    probs_E: np.ndarray
    tokens: int


def parts_of(directory: Path) -> dict[str, list[Part]]:
    found: dict[str, list[Part]] = {}
    for file in directory.glob("rank-*.safetensors"):
        tensors = load_file(file)
        for name in (name for name in tensors if name.endswith("/logits")):
            turn, router, _ = name.split("/")
            cut = len(tensors[f"{turn}/samples"])
            pieces = zip(*(np.split(tensors[key], cut) for key in (name, f"{turn}/{router}/ids", f"{turn}/valid")))
            for number, (logits, ids, valid) in enumerate(pieces):
                odds, ids = np.exp(logits[valid > 0]), ids[valid > 0]
                found.setdefault(router, []).append(Part(
                    int(file.stem[-4:]), int(turn), number, np.bincount(ids[ids >= 0], minlength=logits.shape[1]),
                    (odds / odds.sum(1, keepdims=True)).sum(0), int(valid.sum())))
    return found


def loss_trained_on(parts: list[Part], pooled: Callable[[Part, Part], bool], before: list[Part] | None) -> float:
    """pooled: whether the counts of the second belong to the f of the first. before: the parts of the step before, whose
    shares stand for what the pool lacks of this step."""
    tokens, slots, loss = sum(p.tokens for p in parts), sum(p.counts_E.sum() for p in parts), 0.0
    for part in parts:
        counts_E = sum(other.counts_E for other in parts if pooled(part, other))
        if before:
            past_E = sum(p.counts_E for p in before)
            counts_E = counts_E + (slots - counts_E.sum()) * past_E / past_E.sum()
        loss += len(counts_E) * (counts_E / counts_E.sum() * part.probs_E).sum() / tokens
    return loss


MODES: dict[str, tuple[list[str], int, Callable[[Part, Part], bool]]] = {          # overrides, ranks a machine, what f is counted over
    "exact": ([], 2, lambda own, other: True),
    "count pass": (["train.count_pass=true"], 2, lambda own, other: True),
    "sync": (["balance.mode=sync"], 2, lambda own, other: other.turn == own.turn),
    "buffer": (["balance.mode=buffer"], 2, lambda own, other: other.turn <= own.turn),
    "warm": (["balance.mode=warm", "balance.drift=1"], 2, lambda own, other: other.turn <= own.turn),
    "node": (["balance=node"], 1, lambda own, other: other.rank == own.rank),
    "node, buffer": (["balance=node", "balance.mode=buffer"], 1, lambda own, other: other.rank == own.rank and other.turn <= own.turn),
    "micro": (["balance=micro"], 2, lambda own, other: other[:2] == own[:2]),
    "sequence": (["balance=sequence"], 2, lambda own, other: other is own),
}


@pytest.mark.ranks
@pytest.mark.parametrize("mode", MODES)
def test_a_stranger_computes_the_loss_that_was_trained_on(ranks, tmp_path, mode):
    overrides, per_node, pooled = MODES[mode]
    truth = ranks(2).run(dumped, [*WORDS, *overrides, "balance.weight=0.25"], tmp_path, per_node)[0]
    before: dict[str, list[Part]] = {}
    for directory, (metrics, _) in zip(sorted(tmp_path.iterdir()), truth):
        routers = parts_of(directory)
        assert {len(parts) for parts in routers.values()} == {16} and min(p.tokens for p in routers["layers.0.moe"]) < 12
        of_step, of_pool = (np.mean([loss_trained_on(parts, rule, before.get(name)) for name, parts in routers.items()])
                            for rule in (lambda own, other: True, pooled))
        assert metrics["loss/balance"] == pytest.approx(of_step, rel=1e-12)
        assert (metrics["loss/total"] - metrics["loss/ce"]) / 0.25 == pytest.approx(of_pool, rel=1e-10)
        assert (of_step == of_pool) == (mode in ("exact", "count pass"))                  # the comparison can tell them apart
        before = routers if mode == "warm" else {}
