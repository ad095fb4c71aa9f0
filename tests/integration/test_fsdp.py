"""What FSDP2 must not lose, and what it is there for.

Gradients of statistics, memory, whole parameters after evaluation.
"""

from unittest.mock import patch

import pytest
from torch.distributed.tensor import DTensor

from moetrain.model.transformer import BlockOutput
from moetrain.parallel.state_shards import state_shards
from moetrain.train.evaluation.evaluate import evaluate
from moetrain.train.step import train_step
from tests.support.training import difference, make_run, snapshot, train_steps, union, whole

FSDP = ["run.dtype=float64", "run.nproc=2", "parallel=fsdp", "train.micro_batch=4"]


class Opaque:
    """What a plain dataclass is to FSDP2: one leaf, whose tensors it does not see."""

    def __init__(self, output: BlockOutput) -> None:
        self.output = output

    def __iter__(self):
        return iter(self.output)


def balance_alone(overrides: list[str], opaque: bool = False) -> dict[str, tuple]:
    """Gradients of the routers when the balance loss is all there is."""
    run = make_run([*overrides, "balance.weight=1.0", "loss.z.weight=0", "train.clip=0"])
    if opaque:
        for block in run.state.model.layers:
            block.forward = lambda *arguments, forward=block.forward: Opaque(forward(*arguments))
    with patch("moetrain.losses.language.cross_entropy_sum", lambda logits_BSV, _: logits_BSV.new_zeros(())):
        train_step(run, 1)
    return {name: rows for name, rows in snapshot(run, lambda parameter: parameter.grad).items()
            if "router" in name}


@pytest.mark.ranks
def test_the_balance_loss_alone_moves_the_routers(ranks):
    """FSDP2 finds the tensors that leave a module by flattening its output.

    Statistics that it does not see lose their gradients.
    """
    truth = whole([balance_alone(FSDP[:1])])
    assert all(gradient.abs().max() > 1e-4 for gradient in truth.values())
    assert difference(whole(ranks(2).run(balance_alone, FSDP)), truth)[0] < 1e-10
    try:
        lost = whole(ranks(2).run(balance_alone, FSDP, True))
    except AssertionError as error:
        assert "Error" in str(error)                     # or it fails aloud
    else:
        assert difference(lost, truth)[0] > 1e-2


def held_bytes(overrides: list[str]) -> tuple[int, int, bool]:
    run = make_run(overrides)
    train_step(run, 1)
    evaluate(run.state.model, run.dataset, run.mesh, run.config, step=run.state.step)
    parameters = list(run.state.model.parameters())
    held = sum(shard.rows.nbytes for shard in state_shards(run.state.model))
    moments = sum(shard.rows.nbytes for shard in run.state.state_shards()) - held
    return held, moments, all(isinstance(parameter, DTensor) for parameter in parameters)


@pytest.mark.ranks
@pytest.mark.parametrize("overrides", [["parallel=fsdp"], ["parallel=ep_fsdp", "parallel.ep=2"],
                                       ["parallel=ep_fsdp", "parallel.ep=1"]])
def test_every_rank_keeps_its_part_alone_also_after_an_evaluation(ranks, overrides):
    whole, moments, _ = held_bytes(["run.dtype=float64"])
    parts = ranks(4).run(held_bytes, [*overrides, "run.dtype=float64", "run.nproc=4", "train.micro_batch=4"])
    assert sum(held for held, _, _ in parts) == whole and sum(m for _, m, _ in parts) == moments
    assert max(held for held, _, _ in parts) < 0.3 * whole
    assert all(sharded for _, _, sharded in parts)


@pytest.mark.ranks
def test_experts_that_do_not_divide_are_cut_by_rows(ranks):
    """6 experts over 4 ranks: no rank without a part of each."""
    overrides = ["run.dtype=float64", "model.num_experts=6", "data.min_length=0.4"]
    held = ranks(4).run(train_steps, [*overrides, "run.nproc=4", "parallel=fsdp", "train.micro_batch=4"], 2)
    assert all(len(rank.parameters["layers.1.moe.experts.5.down"][2]) == 4 for rank in held)
    ours, truth = union(held), union([train_steps(overrides, 2)])
    assert difference(ours.parameters, truth.parameters)[0] < 1e-10


def test_one_process_shards_nothing():
    run = make_run(["parallel=fsdp"])
    assert not any(isinstance(parameter, DTensor) for parameter in run.state.model.parameters())
