"""Every router of conf/router/ with random weights, and tokens for it."""

import pytest
import torch
from torch import Tensor

from moetrain.config.build import build
from moetrain.config.compose import compose
from moetrain.config.groups import group_options
from moetrain.routers.base import Router, RouterContext

E, K, D = 8, 3, 5
LIMITED = ["router.num_groups=4", "router.topk_groups=2"]
EVERY = [(option, []) for option in group_options()["router"]] + [("topk", LIMITED), ("sigmoid", LIMITED)]
every_router = pytest.mark.parametrize("option, overrides", EVERY, ids=[
    f"{option}-groups" if overrides else option for option, overrides in EVERY])


def router_of(option: str, overrides: list[str], experts: int = E, k: int = K) -> Router:
    """Random weights and, where there are any, random buffers, in float64."""
    config = compose([f"router={option}", f"model.num_experts={experts}", f"model.top_k={k}", *overrides])
    router = build(config.router, "router", dim=D, num_experts=experts, top_k=k).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in (*router.parameters(), *router.buffers()):
            tensor.copy_(0.5 * torch.randn(tensor.shape, generator=generator))
    return router


def tokens(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def context(count: int, first: int = 0, **fields) -> RouterContext:
    numbers_T = torch.arange(first, first + count)
    return RouterContext(step=1, router="layers.0.moe", sample_ids_T=numbers_T // 4,
                         positions_T=numbers_T % 4, **fields)
