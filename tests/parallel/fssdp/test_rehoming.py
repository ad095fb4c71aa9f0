"""Rehoming: homes move, are sliced and joined.

The state by name, optimizer moments included, stays the same to the bit.
"""

import random

import pytest
import torch
import torch.distributed as dist
from torch import nn

from moetrain.comm.mesh import Group
from moetrain.moe.bank import ExpertBank
from moetrain.moe.expert_form import SwigluExpert
from moetrain.moe.experts import RoutedExperts
from moetrain.parallel.fssdp.rehoming import cut, reshard, together
from moetrain.parallel.state_shards import state_shards
from moetrain.plan.placement import ExpertPlacement, LayerPlacement
from moetrain.train.optim.optimizer import allocate_state
from tests.support.bank_layer import alone
from tests.support.expert_forms import BiasedExpert
from tests.support.training import whole

POSITIONS, DIM, EXPERT_DIM = 4, 3, 5         # of the three rows of down one position has none
SIZES = {"layers.0.moe": 6, "layers.1.moe": 3}
# Layers of other shapes, vectors among them, travel by themselves.
FORMS = {"layers.0.moe": SwigluExpert(dim=DIM, expert_dim=EXPERT_DIM),
         "layers.1.moe": BiasedExpert(dim=DIM, expert_dim=EXPERT_DIM + 2)}


class Model(nn.Module):
    """Modules whose paths look like the model's."""

    def __init__(self, placement: ExpertPlacement, at: int) -> None:
        super().__init__()
        banks = [ExpertBank(experts=layer.experts_of(at), form=FORMS[name], cut=(at, POSITIONS))
                 for name, layer in placement.layers]
        experts = [RoutedExperts(bank, alone(SIZES[name]))
                   for bank, (name, _) in zip(banks, placement.layers)]
        self.layers = nn.ModuleList(nn.ModuleDict({"moe": nn.ModuleDict({"experts": each})})
                                    for each in experts)

    @property
    def banks(self) -> dict[str, ExpertBank]:
        return {f"layers.{index}.moe": layer["moe"]["experts"].bank
                for index, layer in enumerate(self.layers)}


def drawn(seed: int, slices: bool = True) -> ExpertPlacement:
    draw = random.Random(seed)
    return ExpertPlacement(tuple(
        (name, LayerPlacement(tuple(draw.randrange(POSITIONS) for _ in range(size)), POSITIONS, (),
                              tuple(draw.sample(range(size), draw.randint(0, size) if slices else 0))))
        for name, size in SIZES.items()))


def held(model: Model, optimizer: torch.optim.Optimizer) -> dict:
    found = {}
    for kind in ("parameter", "exp_avg", "exp_avg_sq"):
        of = lambda parameter: parameter.data if kind == "parameter" else optimizer.state[parameter][kind]  # noqa: E731, B023
        found.update({f"{kind} {shard.name}": (shard.shape, shard.begin, shard.rows.clone())
                      for shard in state_shards(model, of)})
    return found


def moved(seeds: list[int]) -> tuple[list[dict], list[int]]:
    """State of this position after the placement of each seed, starting from whole homes; how many moved."""
    at, placement = dist.get_rank(), drawn(99, slices=False)
    group = Group("ep", tuple(range(POSITIONS)), at, dist.group.WORLD)
    model = Model(placement, at)
    optimizer = torch.optim.AdamW(model.parameters())
    allocate_state(optimizer)
    for kind, scale in (("parameter", 1), ("exp_avg", 2), ("exp_avg_sq", 3)):
        of = lambda parameter: parameter.data if kind == "parameter" else optimizer.state[parameter][kind]  # noqa: E731, B023
        for shard in state_shards(model, of):
            generator = torch.Generator().manual_seed(sum(map(ord, shard.name)) * scale)
            shard.rows.copy_(torch.randn(shard.shape, generator=generator))
    found, counts = [held(model, optimizer)], []
    for seed in seeds:
        counts.append(reshard(model.banks, optimizer, placement, drawn(seed), group))
        placement = drawn(seed)
        assert all(bank.experts == placement[name].experts_of(at) and bank.sliced == placement[name].sliced
                   for name, bank in model.banks.items())
        found.append(held(model, optimizer))
    return found, counts


@pytest.mark.ranks
def test_the_state_by_name_is_the_same_before_and_after(ranks):
    results = ranks(POSITIONS).run(moved, list(range(12)))
    found = [whole([result[0][index] for result in results]) for index in range(13)]
    assert len(found[0]) == 3 * sum(SIZES[name] * len(FORMS[name].shapes) for name in SIZES)
    for after in found[1:]:
        assert (after.keys() == found[0].keys()
                and all(torch.equal(after[name], found[0][name]) for name in after))
    assert all(result[1] == results[0][1] for result in results) and all(results[0][1])


@pytest.mark.ranks
def test_each_row_of_a_sliced_expert_is_held_once(ranks):
    results = ranks(POSITIONS).run(moved, [3])
    sliced = {f"layers.0.moe.experts.{expert}.gate_up" for expert in drawn(3)["layers.0.moe"].sliced}
    assert sliced
    for name in sliced:
        rows = [len(result[0][1][f"parameter {name}"][2]) for result in results]
        assert rows == [2, 3, 2, 3]


def test_pieces_put_together_are_the_expert():
    shapes = [(5, 2), (1, 3), (4, 1)]
    row = torch.arange(17.)
    for positions in (1, 2, 3, 7):
        assert together([cut(row, shapes, at, positions) for at in range(positions)], shapes).equal(row)
