"""A router on nn.GRUCell, whose state is carried over layers, trains alike however its blocks are run.

The cell writes into parts of a matrix product, which torch's version counter does not see. Every mesh with
every way to recompute; a cell of its own for each router, and one at the model's root for all.
"""

from functools import cache
from itertools import product

import pytest

from moetrain.errors import ConfigError
from tests.support.recurrent_router import cell_in_blocks, own_cells, tied_cell
from tests.support.training import Trained, alone, difference, make_run, train_steps, union

STEPS = 2
BASE = ["run.dtype=float64", "train.global_batch=12", "train.micro_batch=12", "data.min_length=0.5"]
CELLS = {"own": own_cells, "tied": tied_cell}
PASSES = {"none": [], "selective": ["train.activation_checkpointing=selective"],
          "full": ["train.activation_checkpointing=full"],
          "count-selective": ["train.count_pass=true", "train.activation_checkpointing=selective"]}
MESHES = {"single": 1, "ddp": 2, "ep": 2, "fsdp": 2, "ep_fsdp": 2, "fssdp": 2}
FACTORS = {"mesh": list(MESHES), "passes": list(PASSES), "accumulation": [1, 3], "cells": list(CELLS)}
# Every pair of values of two factors occurs, but for accumulation 1 with a count pass, which does nothing.
PAIRS = [
    ("single", "selective", 1, "own"), ("single", "count-selective", 3, "tied"), ("single", "full", 3, "own"),
    ("ddp", "selective", 3, "tied"), ("ep", "selective", 1, "own"), ("ep", "none", 3, "tied"),
    ("ep", "count-selective", 3, "own"), ("fsdp", "selective", 3, "tied"), ("fsdp", "none", 1, "own"),
    ("fsdp", "full", 1, "tied"), ("ep_fsdp", "selective", 1, "tied"),
    ("ep_fsdp", "count-selective", 3, "own"), ("fssdp", "selective", 3, "tied"), ("fssdp", "full", 1, "own"),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = list(product(*FACTORS.values())) if metafunc.config.getoption("--all") else PAIRS
        metafunc.parametrize("case", cases, ids=lambda case: "-".join(map(str, case)))


@cache
def truth(cells: str) -> Trained:
    return alone(BASE, STEPS, None, CELLS[cells])


@pytest.mark.ranks
def test_it_trains_as_in_one_process_that_keeps_everything(ranks, case):
    mesh, passes, accumulation, cells = case
    world = MESHES[mesh]
    overrides = [*BASE, *PASSES[passes], f"parallel={mesh}", f"run.nproc={world}",
                 f"train.micro_batch={12 // world // accumulation}"]
    arguments = (overrides, STEPS, None, CELLS[cells])
    ours = alone(*arguments) if world == 1 else union(ranks(world).run(train_steps, *arguments))
    assert_alike(ours, truth(cells))


def assert_alike(ours: Trained, theirs: Trained) -> None:
    for name in ("gradients", "parameters"):
        error, tensor = difference(getattr(ours, name), getattr(theirs, name))
        assert error < 1e-10, (name, tensor, error)
    for mine, other in zip(ours.metrics, theirs.metrics, strict=True):
        assert mine["loss/total"] == pytest.approx(other["loss/total"], rel=1e-12)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-10)


@pytest.mark.parametrize("cells", CELLS)
def test_every_cell_learns(cells):
    trained = truth(cells)
    names = [name for name in trained.gradients if "cell" in name]
    assert len(names) == (8 if cells == "own" else 4)
    still = [name for name in names if not trained.gradients[name].any()]
    assert still == (["layers.0.moe.router.cell.weight_hh"] if cells == "own" else [])     # its state is 0
    assert trained.metrics[-1]["loss/ce"] < trained.metrics[0]["loss/ce"]


def refused(overrides: list[str]) -> str:
    with pytest.raises(ConfigError) as caught:
        make_run(overrides, None, cell_in_blocks)
    return str(caught.value)


@pytest.mark.ranks
def test_a_cell_that_blocks_share_is_refused_where_fsdp_shards_them_and_exact_elsewhere(ranks):
    overrides = [*BASE, "run.nproc=2", "train.micro_batch=6"]
    for mesh in ("fsdp", "ep_fsdp"):
        for text in ranks(2).run(refused, [*overrides, f"parallel={mesh}"]):
            assert "layers.0.moe.router.cell" in text and "layers.1.moe.router.cell" in text
            assert "shared_modules" in text and "model.tied" in text
    ours = union(ranks(2).run(train_steps, [*overrides, "parallel=ep"], STEPS, None, cell_in_blocks))
    assert_alike(ours, alone(BASE, STEPS, None, cell_in_blocks))
