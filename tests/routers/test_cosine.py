"""Cosine routing beside its equations, in both readings, and what it does not depend on."""

import numpy as np
import pytest
import torch
from torch import Tensor

from moetrain.routers.cosine import CosineRouter
from tests.support.any_router import context


def router_of(**arguments) -> CosineRouter:
    router = CosineRouter(**{"dim": 6, "num_experts": 8, "top_k": 2, "proj_dim": 3, **arguments}).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        router.weight.copy_(torch.randn(router.weight.shape, generator=generator))
        router.projection.copy_(torch.randn(router.projection.shape, generator=generator))
        router.log_scale.fill_(np.log(1 / router.init_temperature))
    return router


def tokens() -> Tensor:
    return torch.randn(30, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("weights", ["renorm", "raw"])
def test_it_is_top_k_of_the_softmax_of_scaled_cosines(weights):
    router = router_of(weights=weights, init_temperature=0.3)
    x_TD, p_PD, e_EP = (tensor.detach().numpy() for tensor in (tokens(), router.projection, router.weight))
    z_TE = unit(x_TD @ p_PD.T) @ unit(e_EP).T / 0.3
    probs_TE = np.exp(z_TE) / np.exp(z_TE).sum(1, keepdims=True)
    ids_TK = np.argsort(-probs_TE, 1)[:, :2]
    weights_TK = np.take_along_axis(probs_TE, ids_TK, 1)
    if weights == "renorm":
        weights_TK /= weights_TK.sum(1, keepdims=True)
    routing = router.route(tokens(), context(30))
    assert routing.ids_TK.tolist() == ids_TK.tolist()
    np.testing.assert_allclose(routing.weights_TK.detach().numpy(), weights_TK)


def test_without_normalized_tokens_it_is_torchscale_which_rewrites_the_length_of_its_vectors():
    router = router_of(normalize_input=False, init_temperature=1.0)
    written_EP = 1.5 * unit(router.weight.detach().numpy())          # in torchscale, in every forward pass
    expected_TE = (tokens() @ router.projection.T).detach().numpy() @ unit(written_EP).T
    before = {name: tensor.clone() for name, tensor in router.state_dict().items()}
    np.testing.assert_allclose(router.logits(tokens()).detach().numpy(), expected_TE)
    assert all(tensor.equal(before[name]) for name, tensor in router.state_dict().items())


def test_the_length_of_tokens_and_of_vectors_changes_no_logit():
    router = router_of()
    plain_TE = router.logits(tokens())
    torch.testing.assert_close(router.logits(1000 * tokens()), plain_TE)
    with torch.no_grad():
        router.weight *= torch.arange(1, 9)[:, None]
    torch.testing.assert_close(router.logits(tokens()), plain_TE)
    assert not router.logits(0 * tokens()).any()


def test_the_temperature_is_learned_and_bounded():
    router = router_of(init_temperature=0.2)
    logits_TE = router.logits(tokens())
    assert 4 < logits_TE.abs().max() <= 5
    (grad,) = torch.autograd.grad(router.route(tokens(), context(30)).weights_TK.square().sum(),
                                  router.log_scale)
    assert grad.abs() > 1e-3
    with torch.no_grad():
        router.log_scale.fill_(50.0)
    torch.testing.assert_close(router.logits(tokens()), 20 * logits_TE)              # max_scale is 100


def test_the_space_is_half_as_wide_as_there_are_experts_unless_told():
    assert CosineRouter(dim=6, num_experts=8, top_k=2).projection.shape == (4, 6)
    assert CosineRouter(dim=6, num_experts=1, top_k=1, weights="raw").weight.shape == (1, 1)
