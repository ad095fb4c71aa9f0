"""The forward passes of a step, one micro-batch after another, each with the pooled counts that its loss needs.

`forwards` hands out a micro-batch's forward when its backward may run; the caller runs it before asking for the next. With
a loss that needs the counts of the whole step (`balance=global`, mode exact) these must be known before the first backward:

    graphs kept   all micro-batches run forward first and keep their graphs; the default
    count pass    all micro-batches run forward without gradients as far as the last router; then each runs again, by the
                  choices already made, and backward: the memory of one micro-batch (train.count_pass)

Otherwise each micro-batch runs forward and backward before the next. Which of the three is a matter of config, so the
collectives are the same on every rank.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from moetrain.comm.reduce import sum_over_async
from moetrain.data.batch import Batch
from moetrain.losses.base import Pooled
from moetrain.model.recompute import Kept
from moetrain.routers.base import RouterContext, RoutingStats
from moetrain.train.metrics import flat_counts, pool
from moetrain.train.objective import cross_entropy_sum
from moetrain.train.setup import Run


class Forward(NamedTuple):
    """One micro-batch on this rank."""

    cross_entropy: Tensor                    # sum in nats, with graph
    stats: dict[str, RoutingStats]
    pooled: Mapping[str, Pooled]             # counts of the step, or of this micro-batch where no loss asks for more


def forwards(run: Run, step: int, batches: list[Batch], tokens: Tensor) -> Iterator[Forward]:
    """Every micro-batch of the step in order. tokens: valid tokens of the global batch. Collective where counts are pooled."""
    routers, group = run.state.model.routers, run.mesh["batch"]
    if not run.objective.needs_pool:
        for batch in batches:
            forward = _forward(run, step, batch)
            yield forward._replace(pooled=pool(flat_counts([forward.stats], routers, tokens.device), routers, tokens))
    elif run.config.train.count_pass:
        counted = [_count(run, step, batch) for batch in batches]
        counts = flat_counts([stats for stats, _ in counted], routers, tokens.device)
        pooled = pool(sum_over_async(group, counts)(), routers, tokens)
        for batch, (_, choices) in zip(batches, counted):
            with choices.replay(whole=False):            # the last layer exchanges its counts only now
                forward = _forward(run, step, batch)
            yield forward._replace(pooled=pooled)
    else:
        kept = [_forward(run, step, batch) for batch in batches]
        counts = sum_over_async(group, flat_counts([forward.stats for forward in kept], routers, tokens.device))
        pooled = pool(counts(), routers, tokens)
        while kept:                                      # each graph is freed once it has run backward
            yield kept.pop(0)._replace(pooled=pooled)


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


def _forward(run: Run, step: int, batch: Batch) -> Forward:
    output = run.state.model(batch.tokens_BS, step_context(run.config.run.seed, step, batch), batch.documents_BS)
    return Forward(cross_entropy_sum(output.logits_BSV, batch.targets_BS), output.stats, {})


@torch.no_grad()
def _count(run: Run, step: int, batch: Batch) -> tuple[dict[str, RoutingStats], Kept]:
    choices = Kept()
    with choices.record():
        output = run.state.model(batch.tokens_BS, step_context(run.config.run.seed, step, batch), batch.documents_BS,
                                 route_only=True)
    return output.stats, choices
