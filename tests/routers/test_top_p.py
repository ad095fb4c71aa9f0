"""Top-p routing by its equations."""

import numpy as np
import pytest
import torch

from moetrain.config.compose import compose
from moetrain.errors import ConfigErrors
from moetrain.routers.base import RouterContext
from moetrain.routers.edits import Edit, RoutingEdits
from moetrain.routers.top_p import TopPRouter

E, D, T = 8, 5, 40
X = torch.randn(T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def routed(p: float, x=X, **arguments):
    router = TopPRouter(dim=D, num_experts=E, p=p, **arguments).double()
    with torch.no_grad():
        router.weight.copy_(torch.randn(E, D, generator=torch.Generator().manual_seed(0)))
    return router, router.route(x, RouterContext())


def used(routing) -> torch.Tensor:
    return (routing.ids_TK >= 0).sum(1)


def by_the_paper(weight, x, p):
    """The fewest experts in descending order whose probabilities sum to p, and these probabilities."""
    chosen = []
    for token in np.asarray(x):
        scores = np.exp(np.asarray(weight) @ token)
        probabilities = scores / scores.sum()
        order = np.argsort(-probabilities, kind="stable")
        number = 1
        while probabilities[order[:number]].sum() < p and number < len(order):
            number += 1
        chosen.append([(int(expert), probabilities[expert]) for expert in order[:number]])
    return chosen


@pytest.mark.parametrize("p", [0.2, 0.4, 0.77, 0.999])
def test_it_takes_the_smallest_set_of_the_paper_and_weighs_by_its_probabilities(p):
    router, routing = routed(p)
    for found, weights, expected in zip(routing.ids_TK.tolist(), routing.weights_TK.tolist(),
                                        by_the_paper(router.weight.detach(), X, p)):
        assert found == [expert for expert, _ in expected] + [-1] * (E - len(expected))
        assert weights[:len(expected)] == pytest.approx([weight for _, weight in expected], rel=1e-12)
        assert sum(weights) >= p
    assert routing.max_rows is None and 1 < used(routing).double().mean() < E


def test_the_number_of_experts_grows_with_p_from_one_to_all():
    numbers = [used(routed(p)[1]) for p in (1e-9, 0.3, 0.5, 0.8, 1.0)]
    assert (numbers[0] == 1).all() and (numbers[-1] == E).all()
    assert all((fewer <= more).all() for fewer, more in zip(numbers, numbers[1:]))
    for p, expected in ((0.4, 4), (0.5, 4), (0.51, 5)):      # ceil(p E) of equal probabilities
        assert (used(routed(p, x=0 * X)[1]) == expected).all()


def test_p_of_1_takes_all_experts_whatever_float32_sums_to():
    """A sum of float32 probabilities reaches 1 before the last expert in most rows."""
    router = TopPRouter(dim=16, num_experts=16, p=1.0)
    with torch.no_grad():
        router.weight.copy_(torch.eye(16))
    x_TD = 6 * torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    assert (used(router.route(x_TD, RouterContext())) == 16).all()
    sums_TE = x_TD.softmax(-1).sort(descending=True).values.cumsum(-1)
    assert (sums_TE[:, :-1] >= 1).any(1).double().mean() > 0.1


def test_bounds_hold_and_edits_forbid_and_force_without_counting_in_the_sum():
    assert used(routed(0.9, k_max=3)[1]).max() == 3 and used(routed(1e-9, k_min=2)[1]).min() == 2
    router, plain = routed(0.5)
    for value, taken in ((-float("inf"), False), (float("inf"), True)):
        edit = Edit(lambda scores, value=value: scores.where(torch.arange(E) != 2, value))
        found = router.route(X, RouterContext(router="a", edits={"a": RoutingEdits(scores=edit)}))
        assert ((found.ids_TK == 2).any(1) == taken).all() and found.weights_TK.isfinite().all()
        assert (used(found) >= used(plain)).all() == taken or not taken


def test_forbidding_all_but_one_expert_leaves_one():
    edit = Edit(lambda scores: scores.where(torch.arange(E) == 2, -float("inf")))
    router, _ = routed(0.5, k_min=2)
    found = router.route(X, RouterContext(router="a", edits={"a": RoutingEdits(scores=edit)}))
    assert (found.ids_TK[:, 0] == 2).all() and (found.ids_TK[:, 1:] == -1).all()


@pytest.mark.parametrize("overrides, code, advice", [
    (["router=top_p", "router.k_min=4", "router.k_max=3"], 254, "router.k_min=3 router.k_max=3"),
    (["router=top_p", "router.p=0"], 64, "router.p="),
    (["router=dtop_p", "router.k_max=4", "model.top_k=6"], 255, "router.target_k=4"),
])
def test_numbers_that_no_token_can_take_are_refused(overrides, code, advice):
    with pytest.raises(ConfigErrors) as caught:
        compose(["model.num_experts=8", *overrides])
    (error,) = caught.value.errors
    assert error.id == f"E-CONFIG-{code:03}" and advice in error.next
