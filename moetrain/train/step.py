"""One optimizer step, on one screen.

    forward of the micro-batches -> counts pooled over ranks -> loss, backward -> gradients summed -> clip -> AdamW

With a loss that needs the pooled counts (`balance=global`, mode exact) all micro-batches run forward before the first
backward, their graphs kept: the counts of the whole step are then known exactly. Otherwise each micro-batch runs forward
and backward before the next.

Collectives of a step, whatever the data: tokens (1), counts (1), gradients (fixed buckets), norm (1), sums (1), and those of
the dispatcher in every MoE layer.
"""

import time
from typing import NamedTuple

import torch
from torch import Tensor

from moetrain.comm.reduce import gather_to_first, sum_over, sum_over_async
from moetrain.data.batch import Batch
from moetrain.errors import NonFiniteError
from moetrain.parallel.expert import global_norm, scale_gradients
from moetrain.routers.base import RouterContext, RoutingStats
from moetrain.train.metrics import SumBuffer, balance_metrics, flat_counts, peak_memory, pool, split_by_router
from moetrain.train.objective import cross_entropy_sum
from moetrain.train.optim import learning_rate, set_learning_rate
from moetrain.train.setup import Run


class StepResult(NamedTuple):
    metrics: dict[str, float]
    counts: dict[str, Tensor]                # pooled, int64 [E] by router
    sources: list[Tensor] | None             # with log.sources, on rank 0: flat counts of every rank


class Forward(NamedTuple):
    cross_entropy: Tensor                    # sum in nats, with graph
    stats: dict[str, RoutingStats]


def train_step(run: Run, step: int) -> StepResult:
    """Optimizer step `step` (from 1): changes the state of `run` and returns the step's numbers. Collective."""
    model, mesh, config = run.state.model, run.mesh, run.config
    routers = model.routers
    watch = Stopwatch(mesh.device)
    batches = [to_device(batch, mesh.device) for batch in run.loader.step(step)]
    tokens = sum_over(mesh["batch"], torch.stack([batch.valid_BS.sum() for batch in batches]).sum())
    watch.lap("data")

    run.state.optimizer.zero_grad(set_to_none=True)
    sums = SumBuffer(routers, mesh.device)
    local = torch.zeros(sum(routers.values()), dtype=torch.int64, device=mesh.device)
    for together in [batches] if run.objective.needs_pool else [[batch] for batch in batches]:
        outputs = [model(batch.tokens_BS, step_context(config.run.seed, step, batch), batch.documents_BS)
                   for batch in together]
        counts = flat_counts([output.stats for output in outputs], routers, mesh.device)
        local += counts
        pooled_counts = sum_over_async(mesh["batch"], counts) if run.objective.needs_pool else lambda: counts
        forwards = [Forward(cross_entropy_sum(output.logits_BSV, batch.targets_BS), output.stats)
                    for output, batch in zip(outputs, together)]
        del outputs
        pooled = pool(pooled_counts(), routers, tokens)
        watch.lap("forward")
        while forwards:
            forward = forwards.pop(0)                    # its graph is freed once it has run backward
            total = run.objective.total(forward.cross_entropy, forward.stats, pooled, tokens)
            sums.add(forward.cross_entropy, total, forward.stats)
            total.backward()
        watch.lap("backward")

    run.parallel.reducer.reduce()
    norm = global_norm(run.parallel.dense, run.parallel.experts, mesh["ep"])
    summed = sums.sum_over(mesh["batch"])
    if not run.objective.needs_pool:
        counts = sum_over(mesh["batch"], local.clone())
    stop_if_not_finite(step, summed.cross_entropy, norm)
    scale_gradients([*run.parallel.dense, *run.parallel.experts], norm, config.train.clip)
    rate = learning_rate(step, config.run.steps, config.optim)
    set_learning_rate(run.state.optimizer, rate)
    run.state.optimizer.step()
    watch.lap("optim")

    total_tokens = int(tokens)
    run.state.step, run.state.tokens = step, run.state.tokens + total_tokens
    by_router = split_by_router(counts, routers)
    seconds = watch.total()
    metrics = {
        "step": step,
        "tokens": run.state.tokens,
        "loss/ce": summed.cross_entropy / max(1, total_tokens),
        "loss/total": summed.total,
        **balance_metrics(by_router, summed, total_tokens),
        "grad_norm": norm.item(),
        "lr": rate,
        "time/step": seconds,
        **watch.laps,
        "throughput/tokens_per_s": total_tokens / seconds,
        "memory/peak": peak_memory(mesh.device),
    }
    sources = gather_to_first(mesh["batch"], local) if config.log.sources else None
    return StepResult(metrics, by_router, sources)


def step_context(seed: int, step: int, batch: Batch, *, training: bool = True) -> RouterContext:
    """What routers may know of a micro-batch; per-token fields are flattened to [T]."""
    positions = torch.arange(batch.tokens_BS.shape[1], device=batch.tokens_BS.device)
    return RouterContext(
        training=training,
        step=step,
        seed=seed,
        sample_ids_T=batch.sample_ids_B[:, None].expand_as(batch.tokens_BS).flatten(),
        positions_T=positions.expand_as(batch.tokens_BS).flatten(),
        valid_T=batch.valid_BS.flatten(),
        token_ids_T=batch.tokens_BS.flatten(),
    )


def to_device(batch: Batch, device: torch.device) -> Batch:
    return Batch(*(part if part is None else part.to(device, non_blocking=True) for part in batch))


def stop_if_not_finite(step: int, cross_entropy: float, norm: Tensor) -> None:
    """Both numbers are the same on every rank, so all stop or none; nothing has been updated yet."""
    if not (torch.isfinite(norm) and abs(cross_entropy) < float("inf")):
        raise NonFiniteError(
            1, f"step {step}: cross-entropy sum {cross_entropy}, gradient norm {norm.item()}",
            where=f"optimizer step {step}", why="a value is not finite; the step was not applied",
            next="start another run (run.name) with a smaller optim.lr or train.clip; a resumed run may change neither",
        )


class Stopwatch:
    """Seconds between laps, by name; laps of one name add up. Waits for the GPU, so that a lap is what it cost."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.laps: dict[str, float] = {}
        self.start = self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = self._now()
        self.laps[f"time/{name}"] = self.laps.get(f"time/{name}", 0.0) + now - self.last
        self.last = now

    def total(self) -> float:
        return self._now() - self.start

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
