"""The balance loss in pipelines.

The counts of a stage are pooled over the ranks that hold it. A micro-batch's f is what has been counted by
its backward, whatever order the schedule brings.

The trainer has no pipelines: torch's schedules drive layers of our model here, with the package's pools,
objective and injected losses. float64 to 1e-10 against one process that is told every pool.
"""

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleLoopedBFS,
)

from moetrain.comm.mesh import DENSE_AXES, axis_groups, build_mesh
from moetrain.comm.reduce import sum_over
from moetrain.config.compose import compose
from moetrain.losses.attached import attach
from moetrain.losses.language import cross_entropy_sum
from moetrain.routers.stack import stacks
from moetrain.train.count_pool import AccumulatedCounts, CountAllReduce
from moetrain.train.metrics import pool
from moetrain.train.micro_batches import step_context
from moetrain.train.setup import set_up
from moetrain.train.state import Run
from tests.support.oracle import oracle_loss
from tests.support.training import TINY, difference, make_run, snapshot, whole

STAGES, MICRO_BATCHES, LAYERS = 2, 4, 4
BASE = ["run.dtype=float64", "balance.weight=0.3", "loss.z.weight=0", "data.min_length=0.2",
        f"model.num_layers={LAYERS}",
        "train.aux_loss=injected", "balance.mode=buffer"]
MESHES = {2: {"pp": 2}, 4: {"pp": 2, "dp_replicate": 2, "ep": 2}}
SCHEDULES = {                                            # chunks of layers on every rank
    "GPipe": (ScheduleGPipe, 1), "1F1B": (Schedule1F1B, 1), "interleaved 1F1B": (ScheduleInterleaved1F1B, 2),
    "breadth first": (ScheduleLoopedBFS, 2),
}


class Chunk(nn.Module):
    """Neighbouring layers, with the embedding or the head where they are the first or the last.

    defect: a bug that is put back on purpose.
    """

    def __init__(self, run: Run, layers: range, tokens: Tensor, defect: str) -> None:
        super().__init__()
        self.run, self.layers, self.tokens, self.defect, self.batches = (
            run, layers, tokens, defect, run.loader.step(1))
        self.blocks = nn.ModuleList(run.state.model.layers[layer] for layer in layers)
        self.routers = {block.moe.name: block.moe.router.num_experts for block in self.blocks}
        self.known = AccumulatedCounts("buffer", self.routers, tokens, None)
        self.travelling: deque[CountAllReduce] = deque()
        self.order: list[tuple[str, int]] = []

    @property
    def names(self) -> tuple[str, ...]:
        """What names of its parameters begin with."""
        ends = ((("embed",) if self.layers.start == 0 else ())
                + (("norm", "head") if self.layers.stop == LAYERS else ()))
        return ends + tuple(f"layers.{layer}." for layer in self.layers)

    def forward(self, x: Tensor, number: Tensor) -> Tensor:
        model, stats, pooling = (self.run.state.model, {},
                                 CountAllReduce(self.run.mesh["batch"], self.routers, x.device))
        context = step_context(0, 1, self.batches[int(number)])._replace(on_counts=pooling.micro_batch())
        if self.layers.start == 0:
            x = F.embedding(x, model.embed)
        rotary = model.rotary.table(x.shape[1], dtype=x.dtype, device=x.device)
        for block in self.blocks:
            x, of_block, _ = block(x, rotary, None, context)
            stats.update(of_block)
        self.travelling.append(pooling)
        self.order.append(("F", int(number)))
        x = self._balanced(x, stacks(stats), int(number))
        return F.linear(model.norm(x), model.head) if self.layers.stop == LAYERS else x

    def _balanced(self, x: Tensor, found: list, number: int) -> Tensor:
        if self.defect == "counts of the forward":
            at_once = self._counts()

        def slopes() -> list:
            self.order.append(("B", number))
            counts_L = at_once if self.defect == "counts of the forward" else self._counts()
            return self.run.objective.slopes(found, pool(counts_L, self.routers, self.tokens))

        return (x if self.defect == "added at the end" and self.layers.stop < LAYERS
                else attach(x, found, slopes))

    def _counts(self) -> Tensor:
        """Of all micro-batches that have come here by now."""
        while self.travelling:
            self.known.add(self.travelling.popleft().wait(), last=False)
        return self.known.total_L.clone()


class Piped(NamedTuple):
    gradients: dict                          # pieces of this rank's layers
    parameters: dict
    order: dict[int, list[tuple[str, int]]]  # by chunk: forwards and backwards of micro-batches, as they ran
    planned: dict[int, list[tuple[str, int]]]      # as the schedule says


def pipelined(schedule: str, world: int, defect: str) -> Piped:
    mesh = build_mesh(MESHES[world], torch.device("cpu"))
    config = compose([*TINY, *BASE, "parallel=ep", f"run.nproc={mesh['batch'].size}",
                      f"train.micro_batch={4 // mesh['batch'].size}"])
    run = set_up(config, Path("unused"), mesh)
    groups = {ranks: dist.new_group(list(ranks)) for ranks in axis_groups(DENSE_AXES, MESHES[world], ("pp",))}
    ranks = next(ranks for ranks in groups if mesh.rank in ranks)
    place, (kind, per_rank) = ranks.index(mesh.rank), SCHEDULES[schedule]
    batches = run.loader.step(1)
    tokens = sum_over(mesh["batch"], sum(batch.valid_BS.sum() for batch in batches))
    total, each = STAGES * per_rank, LAYERS // (STAGES * per_rank)
    chunks = {index: Chunk(run, range(index * each, (index + 1) * each), tokens, defect)
              for index in range(place, total, STAGES)}
    if defect == "mean over a chunk":
        run.objective.num_routers = each

    shape = batches[0].tokens_BS.shape
    hidden, logits = (torch.zeros(*shape, size, dtype=torch.float64, requires_grad=True)
                      for size in (config.model.dim, run.dataset.vocab_size))
    stages = [PipelineStage(chunk, index, total, mesh.device, batches[0].tokens_BS if index == 0 else hidden,
                            logits if index == total - 1 else hidden, group=groups[ranks])
              for index, chunk in chunks.items()]
    pipe = kind(stages if per_rank > 1 else stages[0], MICRO_BATCHES, scale_grads=False,
                loss_fn=lambda output, number:
                cross_entropy_sum(output, batches[int(number)].targets_BS) / tokens)
    numbers = torch.arange(MICRO_BATCHES)
    inputs = [torch.cat([batch.tokens_BS for batch in batches])] if 0 in chunks else []
    pipe.step(*inputs, number=numbers, **({"target": numbers} if total - 1 in chunks else {}))
    run.parallel.reduce()
    own = tuple(name for chunk in chunks.values() for name in chunk.names)
    gradients, parameters = ({name: piece for name, piece in snapshot(run, of).items()
                              if name.startswith(own)}
                             for of in (lambda p: p.grad, lambda p: p.data))
    return Piped(gradients, parameters, {index: chunk.order for index, chunk in chunks.items()},
                 planned(pipe, place, list(chunks)))


def planned(pipe: object, place: int, chunks: list[int]) -> dict[int, list[tuple[str, int]]]:
    """What each chunk of this rank does, one after the other."""
    # What torch says of the second is not what it does, on the last stage
    if isinstance(pipe, ScheduleGPipe | Schedule1F1B):
        # Forwards before the first backward
        ahead = MICRO_BATCHES if isinstance(pipe, ScheduleGPipe) else STAGES - place
        order = [("F", number) for number in range(ahead)]
        for number in range(MICRO_BATCHES):
            order += [("B", number), *([("F", number + ahead)] if number + ahead < MICRO_BATCHES else [])]
        return {place: order}
    actions = [action for action in pipe.pipeline_order[place]
               if action is not None and action.computation_type.value in "FB"]
    return {chunk: [(action.computation_type.value, action.microbatch_index)
                    for action in actions if action.stage_index == chunk]
            for chunk in chunks}


def pools_of(order: list[tuple[str, int]]) -> Callable[[int], list[int]]:
    """By batch of one sequence: the batches that have come by when it runs backward.

    A micro-batch of all ranks has four of them.
    """
    passed = {number: [other for what, other in order[:order.index(("B", number))] if what == "F"]
              for number in range(MICRO_BATCHES)}
    return lambda batch: [4 * other + place for other in passed[batch // 4] for place in range(4)]


def truth(parameters: dict[str, Tensor], pools: list[Callable[[int], list[int]]]) -> dict[str, Tensor]:
    run = make_run([*BASE, "train.micro_batch=1"])
    params = {name.removesuffix(".weight"): tensor.clone().requires_grad_()
              for name, tensor in parameters.items()}
    batches = [(batch.tokens_BS, batch.targets_BS, batch.valid_BS) for batch in run.loader.step(1)]
    total, *_ = oracle_loss(params, batches, balance_weight=0.3, balance_pools=pools, num_layers=LAYERS,
                            num_heads=4, num_kv_heads=2,
                            head_dim=4, top_k=2, num_experts=8, norm_eps=run.config.model.norm_eps)
    total.backward()
    return {name: params[name.removesuffix(".weight")].grad for name in parameters}


def error_of(results: list[Piped], pools: list[Callable[[int], list[int]]]) -> tuple[float, str]:
    return difference(whole([rank.gradients for rank in results]),
                      truth(whole([rank.parameters for rank in results]), pools))


def pools_by_router(results: list[Piped]) -> list[Callable[[int], list[int]]]:
    orders = {index: order for rank in results for index, order in rank.planned.items()}
    return [pools_of(orders[layer * len(orders) // LAYERS]) for layer in range(LAYERS)]


@pytest.mark.ranks
@pytest.mark.parametrize("schedule, world", [*((schedule, 2) for schedule in SCHEDULES), ("1F1B", 4),
                                             ("interleaved 1F1B", 4)])
def test_every_stage_and_chunk_has_the_pool_that_its_schedule_gives_it(ranks, schedule, world):
    results = ranks(world).run(pipelined, schedule, world, "")
    for rank in results:
        assert rank.order == rank.planned
    error, name = error_of(results, pools_by_router(results))
    assert error <= 1e-10, f"{name} differs by {error:.3g} of its largest value"


@pytest.mark.ranks
@pytest.mark.parametrize("schedule", ["GPipe", "breadth first"])
def test_where_all_forwards_come_first_a_pipeline_is_exact(ranks, schedule):
    results = ranks(2).run(pipelined, schedule, 2, "")
    assert error_of(results, [lambda batch: range(16)] * LAYERS)[0] <= 1e-10


@pytest.mark.ranks
@pytest.mark.parametrize("schedule, known", [
    # By chunk and micro-batch: as many more as there are stages behind it
    ("1F1B", [[2, 3, 4, 4], [1, 2, 3, 4]]),
    ("interleaved 1F1B", [[4, 4, 4, 4], [3, 4, 4, 4], [2, 2, 4, 4], [1, 2, 3, 4]]),
])
def test_chunks_know_unlike_much(ranks, schedule, known):
    """So a pool that is not the chunk's own would show."""
    orders = {index: order for rank in ranks(2).run(pipelined, schedule, 2, "")
              for index, order in rank.order.items()}
    assert [[len(pools_of(orders[chunk])(4 * number)) // 4 for number in range(MICRO_BATCHES)]
            for chunk in sorted(orders)] == known


@pytest.mark.ranks
@pytest.mark.parametrize("defect", ["mean over a chunk", "counts of the forward", "added at the end"])
def test_a_loss_that_follows_the_stages_is_seen(ranks, defect):
    results = ranks(2).run(pipelined, "1F1B", 2, defect)
    assert error_of(results, pools_by_router(results))[0] > 1e-3
