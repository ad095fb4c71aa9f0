"""Top-p routing with a threshold that follows a target, by the equation of its controller."""

import numpy as np
import pytest
import torch

from moetrain.routers.base import RouterContext
from moetrain.routers.dtop_p import DTopPRouter

E, D, T = 8, 5, 40
X = torch.randn(T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def controlled(layers: int = 2, **arguments) -> list[DTopPRouter]:
    routers = [DTopPRouter(dim=D, num_experts=E, top_k=2, **arguments).double() for _ in range(layers)]
    for number, router in enumerate(routers):
        generator = torch.Generator().manual_seed(number)
        torch.nn.init.normal_(router.weight, std=0.3 + number, generator=generator)
        router.common_p.fill_(router.p)
        router.error.zero_()
    return routers


def used(router: DTopPRouter) -> torch.Tensor:
    return (router.route(X, RouterContext()).ids_TK >= 0).sum(1)


def step(routers: list[DTopPRouter]) -> float:
    found = [router.route(X, RouterContext()).stats.counts_E for router in routers]
    DTopPRouter.end_of_step_together(routers, found, T)
    return float(sum(counts_E.sum() for counts_E in found)) / T / len(routers)


def test_the_threshold_moves_by_the_equation_of_the_controller():
    routers = controlled(gain_p=0.3, gain_i=0.07)
    p = np.full(1, 0.4)
    before, errors = 0.0, 0.0
    for _ in range(5):
        error = (2 - step(routers)) / E
        p += 0.3 * (error - before) + 0.07 * error
        before, errors = error, errors + error
        assert all(router.common_p.item() == pytest.approx(p.item(), rel=1e-12) for router in routers)
    assert p.item() == pytest.approx(0.4 + 0.3 * before + 0.07 * errors)     # the same, summed up


def test_the_mean_over_layers_meets_the_target_and_layers_share_the_threshold():
    routers = controlled(target_k=2.5)
    means = [step(routers) for _ in range(300)]
    assert np.mean(means[-50:]) == pytest.approx(2.5, abs=0.1) and abs(means[0] - 2.5) > 0.3
    assert routers[0].common_p.equal(routers[1].common_p)
    apart = [used(router).double().mean() for router in routers]
    assert apart[0] > apart[1] + 1                           # the layer that is less sure takes more


def test_a_threshold_at_its_bound_leaves_it_as_soon_as_the_error_turns():
    """No sum of errors winds up while the target cannot be reached."""
    (router,) = controlled(1, target_k=8.0)
    few, many = torch.full((E,), 1), torch.full((E,), 8 * T)
    for _ in range(500):
        DTopPRouter.end_of_step_together([router], [few], T)
    assert router.common_p == 1 and (used(router) == E).all()
    router.target_k = 1.0
    DTopPRouter.end_of_step_together([router], [many], T)
    assert router.common_p < 1
