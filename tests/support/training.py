"""What the integration tests run on every rank: a few real training steps, and what came of them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from moetrain.config.compose import compose
from moetrain.losses.language import LanguageLoss
from moetrain.model.build import ConvertModel
from moetrain.model.op_record import CHECK
from moetrain.parallel.state_shards import state_shards
from moetrain.routers.base import Router, drop_padding
from moetrain.train.session import join
from moetrain.train.setup import set_up
from moetrain.train.state import Run
from moetrain.train.step import train_step

TINY = [
    "data=synthetic", "data.vocab_size=48",
    "train.seq_len=12", "train.global_batch=16", "train.micro_batch=16", "train.clip=0.5",
    "model.dim=16", "model.num_layers=2", "model.expert_dim=16", "model.num_experts=8", "model.init_std=0.2",
    "balance.weight=0.1", "loss=[z]", "loss.z.weight=0.01", "optim=adamw", "optim.lr=1e-2", "optim.warmup=2",
    "run.steps=20", "log.wandb=off", "run.device=cpu",
]
FORCED = {"layers.0.moe": [0, 1], "layers.1.moe": [7, 6]}     # leaves experts and whole ranks without tokens
Forced = dict[str, list[int]] | None
Held = dict[str, tuple[tuple[int, ...], int, Tensor]]


class Trained(NamedTuple):
    """Parts of tensors that this rank holds (`union` puts them together), and the numbers of every step."""

    parameters: dict[str, Tensor] | Held
    gradients: dict[str, Tensor] | Held      # of the first step, clipped
    metrics: list[dict[str, float]]
    counts: list[dict[str, Tensor]]


def make_run(overrides: list[str], forced: Forced = None, convert_model: ConvertModel | None = None,
             language_loss: LanguageLoss | None = None) -> Run:
    config = compose([*TINY, *overrides])
    run = set_up(config, Path("unused"), join(config), convert_model, language_loss)
    if forced:
        force(run, forced)
    return run


def force(run: Run, forced: dict[str, list[int]]) -> None:
    """Every token takes the given experts in the named router; weights still come from the probabilities."""
    for block in run.state.model.layers:
        if block.moe is not None and block.moe.name in forced:
            block.moe.router.route = _forced_route(block.moe.router, forced[block.moe.name])


def _forced_route(router: Router, experts: list[int]):
    from moetrain.ops.gating import decide, gather_weights

    def route(x_TD, context):
        logits = router.logits(x_TD)
        probs = logits.softmax(-1)
        ids = drop_padding(torch.tensor(experts).expand(len(x_TD), -1).contiguous(), context)
        ids = decide(ids)
        weights = gather_weights(probs, ids)
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)
        return router.routing(ids, weights, probs, logits, context)

    return route


def in_float64(ranks: int = 1, accumulation: int = 1) -> list[str]:
    """Overrides of steps of 12 sequences, some padded, on ranks in micro-batches of one size."""
    return ["run.dtype=float64", "data.min_length=0.5", "train.global_batch=12", f"run.nproc={ranks}",
            f"train.micro_batch={12 // ranks // accumulation}"]


def alone(overrides: list[str], steps: int, forced: Forced = None,
          convert_model: ConvertModel | None = None) -> Trained:
    """Training in this one process."""
    return union([train_steps(overrides, steps, forced, convert_model)])


def train_steps(overrides: list[str], steps: int, forced: Forced = None,
                convert_model: ConvertModel | None = None) -> Trained:
    """Training steps whose recomputation is checked (model/op_record.py)."""
    with checked_records():
        return train_run(make_run(overrides, forced, convert_model), steps)


@contextmanager
def checked_records() -> Iterator[None]:
    """Context in which records of operators keep checksums, and what is recomputed is compared bit by bit."""
    before = os.environ.get(CHECK)
    os.environ[CHECK] = "1"
    try:
        yield
    finally:
        os.environ.pop(CHECK)
        if before is not None:
            os.environ[CHECK] = before


def train_run(run: Run, steps: int) -> Trained:
    metrics, counts, gradients = [], [], {}
    for step in range(1, steps + 1):
        result = train_step(run, step)
        metrics.append(result.metrics)
        counts.append({name: count.clone() for name, count in result.counts.items()})
        if step == 1:
            gradients = snapshot(run, lambda parameter: parameter.grad)
    return Trained(snapshot(run, lambda parameter: parameter.data), gradients, metrics, counts)


def snapshot(run: Run, of) -> Held:
    """Copies of the shards this rank holds: name -> (full shape, first row, rows)."""
    return {shard.name: (shard.shape, shard.begin, shard.rows.detach().clone())
            for shard in state_shards(run.state.model, of)}


def union(results: list[Trained]) -> Trained:
    """All ranks' tensors together, whole; ranks that hold the same rows must agree to the last bit."""
    first = results[0]
    for other in results[1:]:
        for ours, its in zip(first.metrics, other.metrics):
            assert ours["loss/ce"] == its["loss/ce"] and ours["grad_norm"] == its["grad_norm"]
    return first._replace(parameters=whole([result.parameters for result in results]),
                          gradients=whole([result.gradients for result in results]))


def whole(held: list[Held]) -> dict[str, Tensor]:
    """Every logical tensor from the shards of all ranks; each row must be there."""
    found: dict[str, Tensor] = {}
    known: dict[str, Tensor] = {}
    for pieces_of_rank in held:
        for name, (shape, begin, rows) in pieces_of_rank.items():
            full = found.setdefault(name, rows.new_empty(shape))
            have = known.setdefault(name, torch.zeros(shape[0] if shape else 1, dtype=torch.bool))
            part = slice(begin, begin + (len(rows) if shape else 1))
            full, rows = (full, rows) if shape else (full[None], rows[None])
            assert torch.equal(full[part][have[part]], rows[have[part]]), f"{name} differs between ranks"
            full[part], have[part] = rows, True
    missing = [name for name, have in known.items() if not have.all()]
    assert not missing, missing
    return found


def difference(ours: dict[str, Tensor], truth: dict[str, Tensor]) -> tuple[float, str]:
    """Largest over tensors of (largest difference / largest value), and the tensor's name."""
    assert ours.keys() == truth.keys(), ours.keys() ^ truth.keys()
    worst = (0.0, "")
    for name, tensor in truth.items():
        scale = tensor.abs().max().item()
        error = (ours[name].double() - tensor.double()).abs()
        error = error.nan_to_num(nan=float("inf")).max().item()          # NaN passes no comparison
        worst = max(worst, (error / scale if scale else error, name))
    return worst


def assert_trains_alike(ours: Trained, theirs: Trained) -> None:
    """Assert that two trainings in float32 differ by the order of sums alone.

    They make the same choices, and their numbers agree to a few roundings.
    """
    for mine, other in zip(ours.counts, theirs.counts, strict=True):
        for name in mine.keys() | other.keys():
            assert mine[name].tolist() == other[name].tolist(), name
    for mine, other in zip(ours.metrics, theirs.metrics, strict=True):
        for name in ("loss/ce", "loss/total", "loss/balance", "grad_norm"):
            assert mine[name] == pytest.approx(other[name], rel=1e-5), name
    # AdamW divides what is small by what is small.
    for what, most in (("gradients", 2e-5), ("parameters", 1e-3)):
        error, name = difference(getattr(ours, what), getattr(theirs, what))
        assert error < most, f"{what}: {name} differs by {error:.3g} of its largest value"
