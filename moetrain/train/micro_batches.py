"""Forward passes of a step, micro-batch by micro-batch, each with the pooled counts that its loss needs.

`forwards` yields a forward pass once its backward may run; the caller runs the backward before it takes the
next. The sum of counts over ranks may still be under way then: `Forward.pooled` waits for it, when the loss
is formed, or in backward where auxiliary losses are injected.

A balance loss in mode exact needs the counts of the whole step before the first backward. There are two ways:

    graphs kept   all micro-batches run forward first, and their autograd graphs are kept
    count pass    all micro-batches run forward without gradients up to the last router; then each runs
                  forward again with the recorded choices, and backward: the memory of one micro-batch

In other modes each micro-batch runs forward and backward before the next one, with the counts known by then
(train/count_pool.py), or with its own counts if no loss pools them. The config decides, and between the two
ways of mode exact the ranks agree (train/memory/graph_memory.py), so collectives are the same on every rank.

Shapes: B sequences, S positions, T = B*S tokens, D model width, V vocabulary, L = sum of choices over
routers.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from moetrain.data.batches.batch import Batch
from moetrain.losses.attached import attach
from moetrain.losses.base import Pooled, PoolRule
from moetrain.losses.language import Head
from moetrain.model.op_record import OpRecord
from moetrain.model.transformer import Ahead
from moetrain.routers.base import RouterContext, RoutingStats
from moetrain.routers.context import token_context
from moetrain.routers.stack import Stack, stacks
from moetrain.train.count_pool import AccumulatedCounts, CountAllReduce, group_of
from moetrain.train.margin_quantiles import MarginQuantiles, OnMargins
from moetrain.train.metrics import flat_counts, pool
from moetrain.train.state import Run

OnCounts = Callable[[str, RoutingStats], None]      # RouterContext.on_counts
# Pooled counts for the stacks of a micro-batch, by the rule of the losses. Waits for a sum that is under way.
PoolCounts = Callable[[Sequence[Stack]], list[Pooled]]


class Forward(NamedTuple):
    """Forward pass of one micro-batch on this rank."""

    language: Tensor                         # scalar, sum of the language loss, with graph
    ahead: Tensor | None                     # scalar, the same of all modules of multi-token prediction
    stacks: list[Stack]                      # statistics of its routers
    # Pooled counts of every stack; those of this micro-batch if no loss pools counts.
    pooled: Callable[[], list[Pooled]]
    # int64 [L], counts of the whole step on all ranks, if losses pool them; valid once `pooled` was called.
    counts_L: Tensor | None = None


# Runs a micro-batch forward, given its pooled counts and `RouterContext.on_counts`.
RunForward = Callable[..., Forward]

def forwards(run: Run, step: int, batches: list[Batch], tokens: Tensor,
             quantiles: MarginQuantiles | None = None) -> Iterator[Forward]:
    """Run every micro-batch of a step forward, in order. Collective where counts are pooled.

    Args:
        run: the run.
        step: number of the step, from 1.
        batches: micro-batches of this rank, on the device.
        tokens: int64 scalar, valid tokens of the global batch.
        quantiles: is told the margins of every forward pass; None: nobody is.

    Yields:
        Each forward pass, once its backward may run.
    """
    rule, routers, experts = run.objective.pool, run.state.model.num_choices, run.state.model.num_experts

    def forward(batch: Batch, pooled: PoolCounts, on_counts: OnCounts | None = None) -> Forward:
        return forward_pass(run, step, batch, pooled, on_counts, quantiles and quantiles.micro_batch())

    if rule is None:
        for batch in batches:
            yield forward(batch, lambda found: pool(flat_counts(found, tokens.device), routers, tokens, None,
                                                    experts))
    elif rule.mode != "exact":
        yield from _as_they_come(run, forward, batches, tokens, rule)
    else:
        yield from _whole_step(run, step, forward, batches, tokens, rule)


def _as_they_come(run: Run, forward: RunForward, batches: list[Batch], tokens: Tensor,
                  rule: PoolRule) -> Iterator[Forward]:
    """Modes sync, buffer and warm: each micro-batch uses the counts that are known at its backward."""
    routers, experts = run.state.model.num_choices, run.state.model.num_experts
    known = AccumulatedCounts(rule.mode, routers, tokens, run.state.prior)
    for number, batch in enumerate(batches, 1):
        pooling, last = (CountAllReduce(group_of(rule, run.mesh), routers, tokens.device,
                                        sums=run.objective.pooled_sums), number == len(batches))

        def pooled(found: Sequence[Stack], pooling: CountAllReduce = pooling,
                   last: bool = last) -> list[Pooled]:
            return pool(known.add(pooling.wait(), last=last), routers, tokens,
                        known.add_sums(pooling.wait_for_sums()), experts)

        passed = forward(batch, pooled, pooling.micro_batch())
        yield passed._replace(counts_L=known.total_L if last and rule.scope == "global" else None)


def _whole_step(run: Run, step: int, forward: RunForward, batches: list[Batch], tokens: Tensor,
                rule: PoolRule) -> Iterator[Forward]:
    """Mode exact: every micro-batch uses the counts of the whole step."""
    routers, experts = run.state.model.num_choices, run.state.model.num_experts
    pooling = CountAllReduce(group_of(rule, run.mesh), routers, tokens.device, len(batches),
                             run.objective.pooled_sums)
    pooled = cache(lambda: pool(pooling.wait(), routers, tokens, pooling.wait_for_sums(), experts))
    passes = (_graphs_kept(forward, batches, pooling, lambda found: pooled()) if run.graphs.kept else
              _counted_first(run, step, forward, batches, pooling, lambda found: pooled()))
    for passed in passes:
        yield passed._replace(counts_L=pooling.counts_L if rule.scope == "global" else None)


def _counted_first(run: Run, step: int, forward: RunForward, batches: list[Batch],
                   pooling: CountAllReduce, pooled: PoolCounts) -> Iterator[Forward]:
    """Count all micro-batches without gradients, then run each one forward with the recorded choices."""
    choices = [_count(run, step, batch, pooling.micro_batch()) for batch in batches]
    for batch, chosen in zip(batches, choices):
        # The record may be shorter than the pass: the last layer exchanges its counts only now.
        with chosen.replay(whole=False):
            passed = forward(batch, pooled)
        yield passed


def _graphs_kept(forward: RunForward, batches: list[Batch], pooling: CountAllReduce,
                 pooled: PoolCounts) -> Iterator[Forward]:
    """Run all micro-batches forward and keep their graphs."""
    kept = [forward(batch, pooled, pooling.micro_batch()) for batch in batches]
    while kept:                                          # each graph is freed once it has run backward
        yield kept.pop(0)


def step_context(seed: int, step: int, batch: Batch, *, training: bool = True, draws: int = 1,
                 per_sequence: bool = False) -> RouterContext:
    """Build what routers are told of a micro-batch.

    Args:
        seed: seed of the run, for keyed randomness.
        step: number of the step, from 1; in evaluation that of the state.
        batch: the micro-batch.
        training: False in evaluation.
        draws: times that the batch has the same sequences, one after the other, with draws of their own.
        per_sequence: whether a loss needs sums of each sequence.
    """
    return token_context(batch.tokens_BS, seed=seed, step=step, training=training, valid_BS=batch.valid_BS,
                         sample_ids_B=batch.sample_ids_B, domains_B=batch.domains_B, draws=draws,
                         per_sequence=per_sequence)


def forward_pass(run: Run, step: int, batch: Batch, pooled: PoolCounts,
                 on_counts: OnCounts | None = None, on_margins: OnMargins | None = None) -> Forward:
    """Run one micro-batch forward, up to its language loss.

    Args:
        run: the run.
        step: number of the step, from 1.
        batch: the micro-batch, on the device.
        pooled: returns the pooled counts of the micro-batch's stacks; called at most once, when they are
            needed.
        on_counts: called with the name and the counts of each router as soon as it has decided.
        on_margins: called with the name and the margins of each router that wants their quantiles.

    Returns:
        The forward pass, with its graph if gradients are enabled.
    """
    found: list[Stack] = []
    predicted: list[Tensor] = []                         # that of the micro-batch, if losses ask for it
    asked = cache(lambda: [each._replace(predicted_T=next(iter(predicted), None)) for each in pooled(found)])

    def routed(x_BSD: Tensor, stats: dict[str, RoutingStats]) -> Tensor:
        found.extend(stacks(stats))
        return (attach(x_BSD, found, lambda: run.objective.slopes(found, asked()))
                if run.objective.attached else x_BSD)

    def score(states_BSD: Tensor, head_VD: Tensor, bias_V: Tensor | None) -> Tensor:
        head = Head(head_VD, run.config.train.head_chunk, bias_V)
        total = language.score(states_BSD, head, batch)
        if run.objective.token_values:
            predicted.append(language.predicted(states_BSD, head, batch))
        assert total.shape == () and total.dtype.itemsize >= 4, (
            f"{type(language).__name__}.score returned {list(total.shape)} of {total.dtype}, no float32 sum")
        return total

    def score_ahead(shifted: Batch, states_BSD: Tensor, head_VD: Tensor, bias_V: Tensor | None) -> Tensor:
        return language.score(states_BSD, Head(head_VD, run.config.train.head_chunk, bias_V), shifted)

    language = run.objective.language
    context = step_context(run.config.run.seed, step, batch, draws=language.draws,
                           per_sequence=run.objective.per_sequence)
    decisions = [] if run.dump is not None and run.dump.wanted else None
    with record_function("forward"):
        output = run.state.model(
            batch.tokens_BS,
            context._replace(on_counts=on_counts, on_margins=on_margins, decisions=decisions,
                             token_sums=run.objective.token_sums,
                             token_values=run.objective.token_values),
            batch.documents_BS, routed=routed, score=score,
            ahead=tokens_ahead(batch, len(run.state.model.mtp), score_ahead))
    if decisions is not None:
        run.dump.add(batch, decisions[:])                # a copy: recomputed blocks append theirs again
    return Forward(output.score, output.ahead, found, asked)


def tokens_ahead(batch: Batch, modules: int, score: Callable[..., Tensor] | None = None) -> list[Ahead]:
    """What modules of multi-token prediction are given of a micro-batch.

    Args:
        batch: the micro-batch.
        modules: number of modules.
        score: called with the shifted micro-batch, and with what a `Score` is called with.

    Returns:
        A record for each module, in the order of their depths.
    """
    shifted = [batch.ahead(depth) for depth in range(1, modules + 1)]
    return [Ahead(each.tokens_BS, each.valid_BS, score and partial(score, each)) for each in shifted]


@torch.no_grad()
def _count(run: Run, step: int, batch: Batch, on_counts: OnCounts) -> OpRecord:
    """Run one micro-batch up to its last router, and record the choices of all routers."""
    choices, context = OpRecord(), step_context(run.config.run.seed, step, batch,
                                                draws=run.objective.language.draws)
    context = context._replace(on_counts=on_counts, token_sums=run.objective.token_sums,
                               token_values=run.objective.token_values)
    with choices.record(), record_function("count"):
        run.state.model(batch.tokens_BS, context, batch.documents_BS, route_only=True,
                        ahead=tokens_ahead(batch, len(run.state.model.mtp)))
    return choices
