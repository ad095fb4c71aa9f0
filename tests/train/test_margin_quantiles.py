"""Quantiles of margins: equal bits for every split of the rows, and every row once."""

import numpy as np
import pytest
import torch
from torch import Tensor

from moetrain.comm.mesh import Group
from moetrain.routers.base import Router
from moetrain.routers.topk import TopKRouter
from moetrain.train.margin_quantiles import MarginQuantiles
from tests.support.training import make_run

ALONE = Group("batch", (0,), 0)
ROWS, SHARES = 137, {"first": (7, 3), "plain": (5, 0), "second": (4, 1)}     # experts, K of them; 0: no bias


def routers() -> dict[str, Router]:
    return {name: TopKRouter(dim=2, num_experts=experts, top_k=k or 2, balance="quantile" if k else "none")
            for name, (experts, k) in SHARES.items()}


def margins(name: str) -> Tensor:
    """Margins with ties; a fifth of the rows is padding."""
    experts, generator = SHARES[name][0], torch.Generator().manual_seed(len(name))
    drawn = torch.randn(ROWS, experts, dtype=torch.float64, generator=generator)
    drawn[::3] = drawn[::3].round(decimals=1)
    drawn[::5] = float("inf")
    return drawn


def found(group: Group, parts: list[slice]) -> dict[str, Tensor]:
    """Quantiles by name, told in micro-batches of these rows; blocks that are recomputed tell again."""
    model = routers()
    quantiles = MarginQuantiles(group, model, [rows.stop - rows.start for rows in parts])
    for rows in parts:
        on_margins = quantiles.micro_batch()
        for _ in range(2):
            for name in ("first", "second"):
                on_margins(name, margins(name)[rows])
    quantiles.advance()
    quantiles.advance()
    names = {router: name for name, router in model.items()}
    return {names[router]: values for router, values in quantiles.quantiles().items()}


def on_rank(sizes: list[list[int]]) -> dict[str, Tensor]:
    """Quantiles of ranks with micro-batches of these sizes, one rank after the other."""
    group = make_run([f"run.nproc={len(sizes)}", "parallel=ddp", "train.micro_batch=8"]).mesh["batch"]
    first = sum(map(sum, sizes[:group.position]))
    parts = []
    for size in sizes[group.position]:
        parts.append(slice(first, first + size))
        first += size
    return found(group, parts)


def test_they_are_those_of_a_sorted_column():
    for name, values in found(ALONE, [slice(0, ROWS)]).items():
        experts, k = SHARES[name]
        valid = margins(name).float().numpy()
        valid = valid[np.isfinite(valid).all(1)]
        expected = np.sort(valid, 0)[len(valid) * k // experts]
        assert values.dtype == torch.float32 and (values.numpy() == expected).all()


@pytest.mark.parametrize("sizes", [[137], [1, 136], [40, 0, 97], [30] * 4 + [17]])
def test_accumulation_changes_no_bit(sizes):
    ends = np.cumsum([0, *sizes]).tolist()
    ours, whole = (found(ALONE, parts) for parts in (
        [slice(*pair) for pair in zip(ends, ends[1:])], [slice(0, ROWS)]))
    assert all(ours[name].equal(values) for name, values in whole.items())


@pytest.mark.ranks
def test_ranks_change_no_bit(ranks):
    whole = found(ALONE, [slice(0, ROWS)])
    for ours in ranks(2).run(on_rank, [[20, 50], [0, 67]]):
        assert all(ours[name].equal(values) for name, values in whole.items())


def test_a_router_that_decides_twice_has_one_quantile_over_both_passes():
    router = TopKRouter(dim=2, num_experts=7, top_k=3, balance="quantile")
    quantiles = MarginQuantiles(ALONE, {"once": router, "again": router}, [80])
    on_margins = quantiles.micro_batch()
    on_margins("once", margins("first")[:57])
    on_margins("again", margins("first")[57:])
    quantiles.advance()
    quantiles.advance()
    assert quantiles.quantiles()[router].equal(found(ALONE, [slice(0, ROWS)])["first"])


def test_padding_alone_has_no_quantile():
    router = TopKRouter(dim=2, num_experts=3, top_k=1, balance="quantile", weights="raw")
    quantiles = MarginQuantiles(ALONE, {"it": router}, [4])
    quantiles.micro_batch()("it", torch.full((4, 3), float("inf")))
    quantiles.advance()
    quantiles.advance()
    values = quantiles.quantiles()[router]
    assert values.isinf().all()
    router.take_quantiles(values)
    assert not router.bias.any()


def test_a_micro_batch_that_tells_nothing_is_noticed():
    quantiles = MarginQuantiles(ALONE, routers(), [ROWS, ROWS])
    quantiles.micro_batch()("first", margins("first"))
    with pytest.raises(AssertionError, match="2 micro-batches have not told"):
        quantiles.advance()


def test_without_a_router_that_asks_nothing_happens():
    quantiles = MarginQuantiles(ALONE, {"plain": routers()["plain"]}, [4])
    assert quantiles.micro_batch() is None and quantiles.advance() is None and quantiles.quantiles() == {}
