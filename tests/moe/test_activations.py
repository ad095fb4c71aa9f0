"""Zero activations of experts, counted by hand and over ranks."""

import numpy as np
import pytest
import torch

from moetrain.moe.activations import ZeroActivations, zero_activations
from tests.support.training import make_run

TOKENS, THRESHOLD = 24, 0.02
FORMS = ["swiglu", "normalized"]


def counted(overrides: list[str], begin: int, end: int) -> ZeroActivations:
    """Counts of the first layer over some of the tokens."""
    layer = make_run(["run.dtype=float64", *overrides]).state.model.layers[0].moe
    generator = torch.Generator().manual_seed(2)
    x_TD = torch.randn(TOKENS, 16, dtype=torch.float64, generator=generator)
    ids_TK = torch.stack([torch.randperm(7, generator=generator)[:2] for _ in range(TOKENS)])
    ids_TK[::5, 1] = -1
    return zero_activations(layer.experts, x_TD[begin:end], ids_TK[begin:end], THRESHOLD)


def on_two_ranks(overrides: list[str]) -> ZeroActivations:
    rank = torch.distributed.get_rank()
    return counted(overrides, rank * TOKENS // 2, (rank + 1) * TOKENS // 2)


@pytest.mark.parametrize("form", FORMS)
def test_activations_are_counted_for_the_expert_that_has_them(form: str) -> None:
    run = make_run(["run.dtype=float64", f"expert={form}"])
    bank = run.state.model.layers[0].moe.experts.bank
    with torch.no_grad():
        bank.gate_up[3, :5] = 0                                          # five gate rows: silu(0) = 0
        bank.gate_up[4] = 0                                              # a dead expert
    x_TD, ids_TK = torch.randn(6, 16, dtype=torch.float64), torch.tensor([[3], [3], [4], [-1], [0], [3]])
    found = zero_activations(run.state.model.layers[0].moe.experts, x_TD, ids_TK)
    assert found.zeros_E.tolist() == [0, 0, 0, 15, 16, 0, 0, 0]
    assert found.all_E.tolist() == [16, 0, 0, 48, 16, 0, 0, 0]
    shares = found.shares()
    np.testing.assert_allclose(shares[[0, 3, 4]].numpy(), [0, 5 / 16, 1])
    assert shares[1].isnan()


@pytest.mark.ranks
def test_counts_of_ranks_add_up_to_those_of_one(ranks) -> None:
    whole = counted([], 0, TOKENS)
    parts = ranks(2).run(on_two_ranks, ["parallel=ep", "run.nproc=2", "train.micro_batch=8"])
    for name in ZeroActivations._fields:
        assert sum(getattr(part, name) for part in parts).equal(getattr(whole, name))
    assert 0 < whole.zeros_E.sum() < whole.all_E.sum()
