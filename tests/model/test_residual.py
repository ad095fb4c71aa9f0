"""Residual MoE against the equations of DeepSpeed-MoE and OpenMoE."""

import numpy as np
import pytest
import torch

from tests.support.layer_equations import array, first_layer, softmax, swiglu, tokens, top_k_mixture

RESIDUAL = ["model.block=residual", "router.weights=raw"]


def dense(layer, x_TD: np.ndarray) -> np.ndarray:
    network = layer.residual.dense
    return swiglu(network.gate_up.weight, network.down.weight, x_TD)


def test_the_sum_is_that_of_openmoe() -> None:
    layer, (x_TD, context) = first_layer(*RESIDUAL, "model.residual_mixing=sum"), tokens()
    x = array(x_TD)
    expected = top_k_mixture(layer, x, 2) + dense(layer, x)
    np.testing.assert_allclose(array(layer(x_TD, context).out_TD), expected, rtol=1e-11)


def test_learned_shares_are_those_of_deepspeed() -> None:
    """c = softmax(W x + b); y = c_0 MoE(x) + c_1 MLP(x): experts first, as in deepspeed/moe/layer.py."""
    layer, (x_TD, context) = first_layer(*RESIDUAL), tokens()
    mixing = layer.residual.mixing
    with torch.no_grad():
        mixing.bias.copy_(torch.tensor([0.3, -0.2]))
    x = array(x_TD)
    c = softmax(x @ array(mixing.weight).T + array(mixing.bias))
    expected = c[:, :1] * top_k_mixture(layer, x, 2) + c[:, 1:] * dense(layer, x)
    np.testing.assert_allclose(array(layer(x_TD, context).out_TD), expected, rtol=1e-11)


@pytest.mark.parametrize("share", [0, 1])
def test_a_share_of_one_leaves_the_other_out(share: int) -> None:
    """c = (0, 1) is the dense network, and no expert has a gradient; c = (1, 0) is the plain layer."""
    layer, (x_TD, context) = first_layer(*RESIDUAL), tokens()
    with torch.no_grad():
        layer.residual.mixing.bias.copy_(torch.tensor([-torch.inf, 0.0] if share else [0.0, -torch.inf]))
    out_TD = layer(x_TD, context).out_TD
    x = array(x_TD)
    expected = dense(layer, x) if share else top_k_mixture(layer, x, 2)
    np.testing.assert_allclose(array(out_TD), expected, rtol=1e-11)
    out_TD.sum().backward()
    left_out = layer.experts.bank.gate_up if share else layer.residual.dense.gate_up.weight
    assert not left_out.grad.any()
