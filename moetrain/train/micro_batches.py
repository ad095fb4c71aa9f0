"""The forward passes of a step, one micro-batch after another, each with the pooled counts that its loss
needs.

`forwards` hands out a micro-batch's forward when its backward may run; the caller runs it before asking for
the next. Counts may still be travelling then: `Forward.pooled` waits for them, at the loss, or in backward
where gradients are attached. Where a loss wants the counts of the whole step (mode exact), these must be
known before the first backward:

    graphs kept   all micro-batches run forward first and keep their graphs
    count pass    all micro-batches run forward without gradients as far as the last router; then each runs again, by the
                  choices already made, and backward: the memory of one micro-batch

Otherwise each micro-batch runs forward and backward before the next, with what is known by then
(train/count_pool.py), or with its own counts where no loss asks for more. Which it is follows from the config
and, of these two, from what the ranks have agreed on (train/memory/graph_memory.py), so the collectives are
the same on every rank.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from moetrain.data.batches.batch import Batch
from moetrain.losses.attached import attach
from moetrain.losses.base import Pooled, PoolRule
from moetrain.model.activation_checkpointing import OpRecord
from moetrain.ops.linear_cross_entropy import linear_cross_entropy
from moetrain.routers.base import RouterContext, RoutingStats, Stack, stacks
from moetrain.train.count_pool import AccumulatedCounts, CountAllReduce, group_of
from moetrain.train.metrics import flat_counts, pool
from moetrain.train.objective import cross_entropy_sum
from moetrain.train.state import Run

OnCounts = Callable[[str, Tensor], None]      # RouterContext.on_counts
PoolCounts = Callable[[Sequence[Stack]], list[Pooled]]     # of a micro-batch's stacks, by the losses' rule; waits where counts are on their way


class Forward(NamedTuple):
    """One micro-batch on this rank."""

    cross_entropy: Tensor                    # sum in nats, with graph
    stacks: list[Stack]
    pooled: Callable[[], list[Pooled]]       # of every stack, by PoolCounts; counts of this micro-batch where no loss asks for more
    counts_L: Tensor | None = None           # flat, of the whole step on all ranks, where the losses want these; once `pooled` was asked


def forwards(run: Run, step: int, batches: list[Batch], tokens: Tensor) -> Iterator[Forward]:
    """Every micro-batch of the step in order.

    tokens: valid tokens of the global batch. Collective where counts are pooled.
    """
    rule, routers = run.objective.pool, run.state.model.routers
    if rule is None:
        for batch in batches:
            yield forward_pass(run, step, batch, lambda found: pool(flat_counts(found, tokens.device), routers, tokens))
    elif rule.mode != "exact":
        yield from _as_they_come(run, step, batches, tokens, rule)
    else:
        yield from _whole_step(run, step, batches, tokens, rule)


def _as_they_come(run: Run, step: int, batches: list[Batch], tokens: Tensor, rule: PoolRule) -> Iterator[Forward]:
    routers = run.state.model.routers
    known = AccumulatedCounts(rule.mode, routers, tokens, run.state.prior)
    for number, batch in enumerate(batches, 1):
        pooling, last = CountAllReduce(group_of(rule, run.mesh), routers, tokens.device), number == len(batches)

        def pooled(found: Sequence[Stack], pooling: CountAllReduce = pooling, last: bool = last) -> list[Pooled]:
            return pool(known.add(pooling.wait(), last=last), routers, tokens)

        forward = forward_pass(run, step, batch, pooled, pooling.micro_batch())
        yield forward._replace(counts_L=known.total_L if last and rule.scope == "global" else None)


def _whole_step(run: Run, step: int, batches: list[Batch], tokens: Tensor, rule: PoolRule) -> Iterator[Forward]:
    routers = run.state.model.routers
    pooling = CountAllReduce(group_of(rule, run.mesh), routers, tokens.device, len(batches))
    pooled = cache(lambda: pool(pooling.wait(), routers, tokens))
    for forward in (_graphs_kept if run.graphs.kept else _counted_first)(run, step, batches, pooling, lambda found: pooled()):
        yield forward._replace(counts_L=pooling.counts_L if rule.scope == "global" else None)


def _counted_first(run: Run, step: int, batches: list[Batch], pooling: CountAllReduce, pooled: PoolCounts) -> Iterator[Forward]:
    choices = [_count(run, step, batch, pooling.micro_batch()) for batch in batches]
    for batch, chosen in zip(batches, choices):
        with chosen.replay(whole=False):                 # the last layer exchanges its counts only now
            forward = forward_pass(run, step, batch, pooled)
        yield forward


def _graphs_kept(run: Run, step: int, batches: list[Batch], pooling: CountAllReduce, pooled: PoolCounts) -> Iterator[Forward]:
    kept = [forward_pass(run, step, batch, pooled, pooling.micro_batch()) for batch in batches]
    while kept:                                          # each graph is freed once it has run backward
        yield kept.pop(0)


def step_context(seed: int, step: int, batch: Batch, *, training: bool = True, per_sequence: bool = False) -> RouterContext:
    """What routers may know of a micro-batch; per-token fields are flattened to [T].

    per_sequence: sums for each are wanted.
    """
    positions = torch.arange(batch.tokens_BS.shape[1], device=batch.tokens_BS.device)
    return RouterContext(
        training=training,
        step=step,
        seed=seed,
        sample_ids_T=batch.sample_ids_B[:, None].expand_as(batch.tokens_BS).flatten(),
        positions_T=positions.expand_as(batch.tokens_BS).flatten(),
        valid_T=batch.valid_BS.flatten(),
        token_ids_T=batch.tokens_BS.flatten(),
        seq_offsets=torch.arange(0, batch.tokens_BS.numel() + 1, batch.tokens_BS.shape[1], device=batch.tokens_BS.device)
        if per_sequence else None,
    )


def forward_pass(run: Run, step: int, batch: Batch, pooled: PoolCounts, on_counts: OnCounts | None = None) -> Forward:
    """pooled: asked once. counted: told the counts of every router as soon as it has decided."""
    found: list[Stack] = []
    asked = cache(lambda: pooled(found))

    def routed(x_BSD: Tensor, stats: dict[str, RoutingStats]) -> Tensor:
        found.extend(stacks(stats))
        return attach(x_BSD, found, lambda: run.objective.slopes(found, asked())) if run.objective.attached else x_BSD

    context = step_context(run.config.run.seed, step, batch, per_sequence=run.objective.per_sequence)
    decisions = [] if run.dump is not None and run.dump.wanted else None
    with record_function("forward"):
        output = run.state.model(batch.tokens_BS, context._replace(on_counts=on_counts, decisions=decisions), batch.documents_BS, routed=routed,
                                 score=_by_chunks(batch, run.config.train.head_chunk))
    if decisions is not None:
        run.dump.add(batch, decisions[:])                # recomputed blocks will add theirs again
    whole = output.score is None
    return Forward(cross_entropy_sum(output.logits_BSV, batch.targets_BS) if whole else output.score, found, asked)


def _by_chunks(batch: Batch, chunk: int) -> Callable[[Tensor, Tensor], Tensor] | None:
    """The cross-entropy without all logits at once; None where they are wanted."""
    if not chunk:
        return None
    return lambda x_BSD, head_VD: linear_cross_entropy(x_BSD.flatten(0, 1), head_VD, batch.targets_BS.flatten(), chunk)


@torch.no_grad()
def _count(run: Run, step: int, batch: Batch, on_counts: OnCounts) -> OpRecord:
    choices, context = OpRecord(), step_context(run.config.run.seed, step, batch)._replace(on_counts=on_counts)
    with choices.record(), record_function("count"):
        run.state.model(batch.tokens_BS, context, batch.documents_BS, route_only=True)
    return choices
