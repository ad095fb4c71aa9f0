"""One optimizer step.

    forward of micro-batches -> pool counts over ranks -> loss, backward -> sum gradients -> clip -> update

How the forward passes obtain the pooled counts: train/micro_batches.py.

Collectives of a step, whatever the data: denominators (1), counts (1), gradients (fixed buckets, or FSDP2's),
norm (2), sums and flags (1), quantiles of margins (3, if a router wants them), and those of the dispatcher in
every MoE layer. Copies of experts (parallel/fssdp/copies.py) add the gathers of copies and the reductions of
their gradients, in the layers that have copies, and the comparison of plans (1).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from moetrain.comm.agreement import fail_together
from moetrain.comm.reduce import gather_to_first, sum_over
from moetrain.data.batches.batch import Batch, padding
from moetrain.errors import ConfigError, DataError, NonFiniteError
from moetrain.parallel.grad_norm import global_norm, scale_gradients
from moetrain.train.checkpoint.save import SaveFlags
from moetrain.train.loggers.stopwatch import rank_metrics
from moetrain.train.margin_quantiles import MarginQuantiles
from moetrain.train.memory.device_memory import peak_memory
from moetrain.train.metrics import (
    StepSums,
    SumBuffer,
    balance_metrics,
    flat_counts,
    forecast_metrics,
    loss_metrics,
    split_by_router,
)
from moetrain.train.micro_batches import forwards
from moetrain.train.objective import Denominators
from moetrain.train.optim.lr_schedule import learning_rate
from moetrain.train.optim.optimizer import set_gradient_norm, set_learning_rate
from moetrain.train.state import Run


class StepFlags(NamedTuple):
    """What a rank reports with a step; after the step, the sums over ranks.

    The flags are summed together with the metrics, so agreement on them takes no collective of its own.
    """

    stop: int = 0                            # a signal asks for a save and an exit (preemption.py)
    save_done: int = 0                       # this rank's part of the save under way is written (Saver.poll)
    save_failed: int = 0                     # … or could not be written
    save_overdue: int = 0                    # the last save is too long ago (Saver.overdue)
    data_failed: int = 0                     # the data of this step could not be read (read_batches)

    @property
    def save(self) -> SaveFlags:
        """The flags of the save under way."""
        return SaveFlags(self.save_done, self.save_failed)


class StepResult(NamedTuple):
    """Outcome of an optimizer step: the same on every rank, except `sources`, times and memory."""

    metrics: dict[str, float]                # docs/reference/files.md
    counts: dict[str, Tensor]                # pooled, int64 [C] by router, on the host
    sources: list[Tensor] | None             # with log.sources, on rank 0: flat counts of every rank
    flags: StepFlags                         # summed over ranks


def train_step(run: Run, step: int, flags: StepFlags = StepFlags()) -> StepResult:
    """Take one optimizer step. Collective.

    Args:
        run: the run; its state advances to `step`.
        step: number of the step, from 1.
        flags: what this rank reports with the step.

    Returns:
        Metrics, counts and summed flags of the step.

    Raises:
        DataError: this rank cannot read the data of the step; the other ranks exit with the same code.
        NonFiniteError: loss or gradient norm is not finite; on all ranks, and no update is applied.
    """
    model, mesh, config, planning = run.state.model, run.mesh, run.config, run.state.planning
    choices, watch = model.num_choices, run.watch
    watch.restart()
    copies = planning.agreed().num_copies if planning else 0
    batches, failure = read_batches(run, step)
    denominators = count_terms(run, batches)
    tokens = denominators.tokens
    watch.lap("data")

    run.state.optimizer.zero_grad(set_to_none=True)
    run.parallel.begin(len(batches))
    flags = flags._replace(data_failed=int(failure is not None))
    sums = SumBuffer(choices, model.num_experts, mesh.device, flags, model.routers_needing_load_error,
                     tuple(run.objective.term_weights))
    local = torch.zeros(sum(choices.values()), dtype=torch.int64, device=mesh.device)
    pooled_L = None                          # counts of the whole step on all ranks, where a loss pools them
    quantiles = MarginQuantiles(mesh["batch"], model.routers,
                                [batch.tokens_BS.numel() for batch in batches])
    for forward in forwards(run, step, batches, tokens, quantiles):
        watch.lap("forward")
        share = run.objective.backward(forward.language, forward.stacks, forward.pooled, denominators.terms,
                                       forward.ahead)
        sums.add(forward.language, share, forward.stacks)
        local += flat_counts(forward.stacks, mesh.device)
        pooled_L = forward.counts_L
        watch.lap("backward")

    quantiles.advance()                      # between what hides the sums of each digit
    with record_function("reduce"):
        run.parallel.reduce()
    norm = global_norm(run.parallel.dense, run.parallel.experts, mesh)
    counts_L = sum_over(mesh["batch"], local.clone()) if pooled_L is None else pooled_L
    summed = sums.sum_over(mesh["batch"], watch.phases(), counts_L, denominators, norm)
    watch.settle()
    agreed = StepFlags(*map(int, summed.flags))
    if agreed.data_failed:
        fail_together(mesh["batch"], failure)
    stop_if_not_finite(step, summed)
    quantiles.advance()
    clipped_norm = scale_gradients([*run.parallel.dense, *run.parallel.experts], summed.norm,
                                   config.train.clip)
    rate = learning_rate(step, config.run.steps, config.optim)
    set_learning_rate(run.state.optimizer, rate)
    set_gradient_norm(run.state.optimizer, clipped_norm)
    with record_function("optimizer"):
        run.state.optimizer.step()
    model.end_of_step(split_by_router(counts_L, choices), summed.tokens, summed.load_error_signs,
                      quantiles.quantiles())
    if run.state.prior:
        run.state.prior.observe(counts_L, tokens)
    counts = split_by_router(summed.counts_L, choices)
    if planning:
        planning.observe(step, counts)
    watch.lap("optim")

    run.state.step = step
    run.state.tokens += summed.tokens // run.objective.language.draws
    sources = gather_to_first(mesh["batch"], local) if config.log.sources else None
    return StepResult(step_metrics(run, summed, rate, copies), counts, sources, agreed)


def step_metrics(run: Run, summed: StepSums, rate: float, copies: int) -> dict[str, float]:
    """Metrics of the step that `run` has just taken, in the order of docs/reference/files.md.

    Args:
        run: the run, after the step.
        summed: sums of the step over micro-batches and ranks.
        rate: learning rate of the step.
        copies: planned copies of experts, over all layers and positions.

    Returns:
        Metrics by name.
    """
    planning, seconds = run.state.planning, run.watch.total()
    brought = {name: value for loss in run.objective.weights
               for name, value in run.objective.losses[loss].metrics(summed.extra, summed.tokens).items()}
    metrics = {
        "step": run.state.step,
        "tokens": run.state.tokens,
        "loss/ce": summed.language / max(1, summed.language_terms),
        "loss/total": summed.total,
        **loss_metrics(summed.terms, run.objective.term_weights),
        **balance_metrics(summed, run.state.model.num_choices, run.state.model.num_experts),
        "moe/copies": copies,
        "moe/added_copies": run.parallel.copies.added if planning else 0,
        **forecast_metrics(planning.forecaster.errors_r if planning else []),
        "grad_norm": summed.norm,
        "lr": rate,
        "time/step": seconds,
        **run.watch.laps,
        **rank_metrics(summed.phases),
        "throughput/tokens_per_s": summed.tokens // run.objective.language.draws / seconds,
        **({"throughput/mfu": summed.tokens / seconds / run.peak_tokens_per_s}
           if run.peak_tokens_per_s else {}),
        "memory/peak": peak_memory(run.mesh.device),
    }
    if taken := sorted(brought.keys() & metrics.keys()):
        raise ConfigError(
            238, f"a loss brings a metric of the name {taken[0]}",
            where="AuxLoss.metrics of the losses in use",
            why="moetrain writes a metric of that name, which it would replace",
            next=f'another name, such as "loss/<loss>/{taken[0].rpartition("/")[2]}"')
    return {**metrics, **brought}


def read_batches(run: Run, step: int) -> tuple[list[Batch], DataError | None]:
    """Read this rank's micro-batches. If that fails, return padding in their place, and the error.

    The other ranks learn of the error from the flags of the step, which all ranks run to its end and none
    applies. Agreement before the step would make the host wait for the device in every step.

    Args:
        run: the run.
        step: number of the step, from 1.

    Returns:
        The micro-batches on the device, as often as the language loss runs them, and the error or None.
    """
    draws = run.objective.language.draws
    try:
        return [batch.to(run.mesh.device).repeated(draws) for batch in run.loader.step(step)], None
    except DataError as error:
        train, sequences = run.config.train, run.config.train.per_forward(run.mesh["batch"].size)
        nothing = padding(sequences, train.seq_len,
                          mask_documents=run.config.data.mask_documents).to(run.mesh.device)
        return [nothing.repeated(draws)] * run.loader.micro_batches, error


def count_terms(run: Run, batches: list[Batch]) -> Denominators:
    """Count the valid tokens of the global batch and the terms of its language loss. Collective."""
    counted = [torch.stack([batch.valid_BS.sum(), run.objective.language.count(batch)]) for batch in batches]
    return Denominators(*sum_over(run.mesh["batch"], torch.stack(counted).sum(0)))


def stop_if_not_finite(step: int, sums: StepSums) -> None:
    """Raise NonFiniteError if loss or gradient norm is not finite, before anything is updated.

    Both numbers are the same on every rank, so all ranks raise or none.
    """
    if not (math.isfinite(sums.norm) and math.isfinite(sums.language)):
        raise NonFiniteError(
            1, f"step {step}: sum of the language loss {sums.language}, gradient norm {sums.norm}",
            where=f"optimizer step {step}", why="a value is not finite; the step was not applied",
            next="start another run (run.name) with a smaller optim.lr or train.clip; "
                 "a resumed run may change neither",
        )
