"""SparseMixer beside its equations: whom it draws, weights of both rounds, and the estimated gradient."""

import numpy as np
import pytest
import torch
from torch import Tensor

from moetrain.ops.keyed_random import gumbel, uniform
from moetrain.routers.base import Routing
from moetrain.routers.edits import Edit, RoutingEdits
from moetrain.routers.sparsemixer import SparseMixerRouter
from tests.support.any_router import context

EPS = 0.2                                    # wide, so that several experts are in reach


def routed(z_TE: Tensor, *, training: bool = True, eps: float = EPS) -> tuple[Routing, Tensor]:
    """Decide by these logits; the second value is the leaf that has their gradient."""
    router = SparseMixerRouter(dim=z_TE.shape[1], num_experts=z_TE.shape[1], top_k=2, eps=eps).double()
    with torch.no_grad():
        router.weight.copy_(torch.eye(z_TE.shape[1]))
    leaf = z_TE.clone().requires_grad_()
    return router.route(leaf, context(len(z_TE), training=training)), leaf


def normal_logits(count: int, experts: int) -> Tensor:
    return torch.randn(count, experts, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def rounds_of(z_E: np.ndarray):
    """Softmax over the experts in reach, of the round after the chosen ones that are sent in."""
    left_E = z_E.copy()
    while True:
        best = left_E.max()
        near_E = np.where((best - z_E) / np.maximum(np.abs(z_E), best) > 2 * EPS, -np.inf, left_E)
        powers_E = np.exp(near_E - near_E.max())
        left_E[(yield powers_E / powers_E.sum())] = -np.inf


@pytest.mark.parametrize("training", [True, False])
def test_it_chooses_and_weighs_as_phi(training):
    z_TE, told = normal_logits(200, 6), context(200)
    noise = [gumbel(told, 6, use=use, dtype=torch.float64).numpy() for use in ("first", "second")]
    drawn_TK = uniform(told, 2, use="midpoint").numpy()
    ids, weights = [], []
    for token, z_E in enumerate(z_TE.numpy()):
        rounds = rounds_of(z_E)
        gates_E, chosen, row = next(rounds), [], []
        for turn in range(2):
            with np.errstate(divide="ignore"):
                chosen.append(int(np.argmax(np.log(gates_E) + training * noise[turn][token])))
            best = chosen[-1] == gates_E.argmax() or drawn_TK[token, turn] < 1 / 4
            row.append(gates_E[chosen[-1]] * (1 if best or not training else 1 / 3))
            gates_E = rounds.send(chosen[-1])
        ids.append(chosen)
        weights.append(row)
    routing, _ = routed(z_TE, training=training)
    assert routing.ids_TK.tolist() == ids
    np.testing.assert_allclose(routing.weights_TK.detach().numpy(), weights, rtol=1e-12)
    if not training:
        assert routing.ids_TK.equal(z_TE.topk(2).indices)


def test_the_gradient_is_that_of_the_weight_before_it_is_scaled():
    z_TE = torch.tensor([[1.0, 0.95, 0.9, -2.0]], dtype=torch.float64).expand(60, 4)
    routing, leaf = routed(z_TE)
    seed_TK = torch.rand(60, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (grad_TE,) = torch.autograd.grad((routing.weights_TK * seed_TK).sum(), leaf)
    expected_TE = np.zeros((60, 4))
    for token, (chosen, seeds) in enumerate(zip(routing.ids_TK.tolist(), seed_TK.tolist())):
        rounds = rounds_of(z_TE[token].numpy())
        gates_E = next(rounds)
        for expert, seed in zip(chosen, seeds):
            expected_TE[token] += seed * gates_E[expert] * (np.eye(4)[expert] - gates_E)
            gates_E = rounds.send(expert)
    np.testing.assert_allclose(grad_TE.numpy(), expected_TE, atol=1e-15)
    assert len(set(routing.ids_TK[:, 0].tolist())) == 3      # of those in reach, each is drawn


def test_experts_are_drawn_by_the_softmax_of_those_in_reach_and_others_are_halved_on_average():
    z_E = torch.tensor([1.0, 0.8, 0.7, 0.5, -1.0], dtype=torch.float64)
    routing, _ = routed(z_E.expand(20_000, 5))
    gates_E = z_E[:3].softmax(0)
    share_E = torch.bincount(routing.ids_TK[:, 0], minlength=5) / 20_000
    assert share_E[3:].sum() == 0                            # 0.5 is 0.5 / 1 from the best, beyond 0.4
    torch.testing.assert_close(share_E[:3].double(), gates_E, atol=0.011, rtol=0)    # 3 standard deviations
    for expert in (1, 2):
        factors = routing.weights_TK[routing.ids_TK[:, 0] == expert, 0] / gates_E[expert]
        assert factors.mean().item() == pytest.approx(0.5, abs=3 * (1 / 12 / len(factors)) ** 0.5)


def test_in_evaluation_most_weights_are_1_and_are_not_normalized():
    """Figures of Gaussian logits, E = 16; a loader that renormalizes would halve the output."""
    routing, _ = routed(normal_logits(20_000, 16), training=False, eps=0.01)
    first_T = routing.weights_TK[:, 0]
    assert (first_T == 1).double().mean().item() == pytest.approx(0.95, abs=0.01)
    assert first_T.mean().item() == pytest.approx(0.976, abs=0.003)
    assert routing.weights_TK.sum(1).mean() > 1.9


def test_equal_logits_are_all_in_reach():
    routing, _ = routed(torch.zeros(4, 5, dtype=torch.float64), training=False)
    assert routing.ids_TK.tolist() == [[0, 1]] * 4
    torch.testing.assert_close(routing.weights_TK[0], torch.tensor([1 / 5, 1 / 4], dtype=torch.float64))


def test_the_successor_of_a_masked_expert_has_its_weight():
    z_TE = normal_logits(50, 6)
    z_TE[:, 0] = 9.0                                         # the best by far
    router = SparseMixerRouter(dim=6, num_experts=6, top_k=2, eps=EPS).double()
    with torch.no_grad():
        router.weight.copy_(torch.eye(6))
    edit = RoutingEdits(scores=Edit(lambda order_TC: order_TC.index_fill(1, torch.tensor(0), -torch.inf)))
    told = context(50, training=False)._replace(router="a", edits={"a": edit})
    masked = router.route(z_TE, told)
    z_TE[:, 0] = -9.0
    without = router.route(z_TE, told._replace(edits=None))
    assert (masked.ids_TK > 0).all() and masked.ids_TK.equal(without.ids_TK)
    torch.testing.assert_close(masked.weights_TK, without.weights_TK)
