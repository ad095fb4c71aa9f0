"""The balance loss where every sequence is cut up between ranks (the mesh's axis `cp`).

These ranks belong to the pool.

The trainer has no attention for that yet. One that gathers what it looks at stands in for it here; everything
else is the trainer's. float64 to 1e-10 against whole sequences in one process.
"""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moetrain.comm.mesh import Group, build_mesh
from moetrain.config.compose import compose
from moetrain.data.batches.batch import Batch
from moetrain.data.loader import Loader
from moetrain.model.attention import Attention
from moetrain.model.rotary import Rotary
from moetrain.train import micro_batches as passes
from moetrain.train.setup import set_up
from moetrain.train.state import Run
from moetrain.train.step import train_step
from tests.support.balance_oracle import BASE
from tests.support.training import TINY, difference, make_run, snapshot, whole

STEPS, LENGTH = 3, 12
MESHES = {2: {"cp": 2, "ep": 2}, 4: {"dp_replicate": 2, "cp": 2, "edp_replicate": 2, "ep": 2}}
MODES = {"exact": [], "exact, recomputed": ["train.activation_checkpointing=full"],
         "count pass": ["train.count_pass=true"],
         "count pass, recomputed": ["train.count_pass=true", "train.activation_checkpointing=full"],
         "buffer": ["balance.mode=buffer"],
         "warm, attached": ["balance.mode=warm", "balance.drift=1", "train.aux_loss=injected"]}


class Gathered(torch.autograd.Function):
    """The stretches [B, s, D] of all ranks of a group, one after the other [B, S, D]."""

    @staticmethod
    def forward(ctx, x_BsD: Tensor, group: Group) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x_BsD) for _ in group.ranks]
        dist.all_gather(parts, x_BsD.contiguous(), group=group.process_group)
        return torch.cat(parts, 1)

    @staticmethod
    def backward(ctx, grad_BSD: Tensor) -> tuple[Tensor, None]:
        grad_BSD = grad_BSD.contiguous().clone()
        dist.all_reduce(grad_BSD, group=ctx.group.process_group)
        return grad_BSD.chunk(ctx.group.size, 1)[ctx.group.position], None


class OverRanks(nn.Module):
    """Attention of a stretch over the whole sequence."""

    def __init__(self, attention: Attention, group: Group, rotary: Rotary) -> None:
        super().__init__()
        self.attention, self.group, self.rotary = attention, group, rotary

    def forward(self, x_BsD: Tensor, rotary: Rotary, mask: Tensor | None,
                earlier: None = None) -> Tensor:
        mixed_BSD = self.attention(Gathered.apply(x_BsD, self.group), self.rotary, mask)
        return mixed_BSD.chunk(self.group.size, 1)[self.group.position]


class Cut:
    """The loader of the ranks that share sequences, each with its stretch."""

    def __init__(self, loader: Loader, group: Group) -> None:
        self.loader, self.group, self.micro_batches = loader, group, loader.micro_batches

    def step(self, step: int) -> list[Batch]:
        return [batch._replace(**{
                    field: getattr(batch, field).chunk(self.group.size, 1)[self.group.position].contiguous()
                    for field in ("tokens_BS", "targets_BS", "valid_BS")})
                for batch in self.loader.step(step)]


def over_ranks(world: int, overrides: list[str]) -> Run:
    mesh = build_mesh(MESHES[world], torch.device("cpu"))
    config = compose([*TINY, *overrides, "parallel=ep", "parallel.ep=2", f"run.nproc={world}",
                      "train.micro_batch=2"])
    run = set_up(config, Path("unused"), mesh)
    first = mesh.rank // 2 * 2
    group = Group("cp", (first, first + 1), mesh.rank - first, mesh["ep"].process_group)
    assert group.ranks == mesh["ep"].ranks
    rotary = run.state.model.rotary.table(LENGTH, dtype=torch.float64, device=mesh.device)
    for block in run.state.model.layers:
        block.attention = OverRanks(block.attention, group, rotary)
    run.loader = Cut(Loader(run.dataset, global_batch=16, micro_batch=8 // world, rank=first // 2,
                            ranks=world // 2), group)
    return run


def train(run: Run) -> tuple[dict, list[dict], list[tuple[float, float, float]]]:
    """(parameters afterwards, counts, numbers) of a few steps."""
    results = [train_step(run, step) for step in range(1, STEPS + 1)]
    held = {name.replace("attention.attention.", "attention."): piece
            for name, piece in snapshot(run, lambda p: p.data).items()}
    return (held, [{name: counts.tolist() for name, counts in result.counts.items()} for result in results],
            [tuple(result.metrics[name] for name in ("loss/balance", "loss/ce", "grad_norm"))
             for result in results])


def train_over_ranks(world: int, overrides: list[str], alone: bool = False) -> tuple:
    """alone: the defect, ranks that share sequences do not share their counts."""
    run, original = over_ranks(world, overrides), passes.group_of
    if alone:
        passes.group_of = lambda rule, mesh: Group("alone", (mesh.rank,), 0)
    try:
        return train(run)
    finally:
        passes.group_of = original


@pytest.mark.ranks
@pytest.mark.parametrize("mode, world", [*((mode, 2) for mode in MODES), ("exact", 4), ("buffer", 4)])
def test_models_whose_sequences_are_cut_up_train_as_on_whole_ones(ranks, mode, world):
    overrides = [*BASE, *MODES[mode]]
    truth, counts, numbers = train(make_run([*overrides, "train.micro_batch=4"]))
    results = ranks(world).run(train_over_ranks, world, overrides)
    error, name = difference(whole([held for held, _, _ in results]), whole([truth]))
    assert error <= 1e-10, f"{name} differs by {error:.3g} of its largest value"
    for _, theirs, found in results:
        assert theirs == counts
        for step, expected in zip(found, numbers):
            assert step == pytest.approx(expected, rel=1e-10)


@pytest.mark.ranks
def test_a_pool_without_the_ranks_that_share_sequences_is_seen(ranks):
    truth, *_ = train(make_run([*BASE, "balance.mode=buffer", "train.micro_batch=4"]))
    results = ranks(2).run(train_over_ranks, 2, [*BASE, "balance.mode=buffer"], True)
    router = "layers.0.moe.router.weight"
    ours = results[0][0][router][2]
    assert (ours - truth[router][2]).abs().max() > 1e-4 * truth[router][2].abs().max()
