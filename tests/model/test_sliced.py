"""Union-of-Experts' slices against the dense network that they are cut from."""

import numpy as np
import torch

from moetrain.config.compose import compose
from moetrain.config.sizes import count_parameters
from moetrain.model.flops import training_flops
from tests.support.layer_equations import array, first_layer, swiglu, tokens, top_k_mixture

SLICED = ["model.block=sliced", "router.weights=raw"]


def dense(bank, x_TD: np.ndarray) -> np.ndarray:
    """The network that the slices are of: their gate rows, their up rows, their down columns, in order."""
    gates, ups = bank.gate_up.chunk(2, 1)
    return swiglu(torch.cat([gates.flatten(0, 1), ups.flatten(0, 1)]), torch.cat(list(bank.down), 1), x_TD)


def test_all_slices_with_equal_weights_are_the_dense_network() -> None:
    layer, (x_TD, context) = first_layer(*SLICED, "model.top_k=8"), tokens()
    with torch.no_grad():
        layer.router.weight.zero_()
    np.testing.assert_allclose(array(layer(x_TD, context).out_TD), dense(layer.experts.bank, array(x_TD)),
                               rtol=1e-12)


def test_the_chosen_slices_are_summed_by_scaled_gates() -> None:
    layer, (x_TD, context) = first_layer(*SLICED, "model.top_k=3"), tokens()
    out_TD = layer(x_TD, context).out_TD
    np.testing.assert_allclose(array(out_TD), 8 * top_k_mixture(layer, array(x_TD), 3), rtol=1e-11)
    out_TD.sum().backward()
    assert layer.router.weight.grad.abs().max() > 0          # the released code gives its router none


def test_half_of_the_slices_cost_half_of_the_dense_network() -> None:
    """Slices have the parameters of the dense network, and a token that visits half of them half the work."""
    sizes = compose(["model.block=sliced", "model.num_experts=8", "model.top_k=4"]).model
    whole = compose(["model.first_dense_layers=2", f"model.dense_dim={8 * sizes.expert_dim}"]).model
    routers = sizes.num_layers * 8 * sizes.dim
    assert count_parameters(sizes, 100).total == count_parameters(whole, 100).total + routers
    rest = training_flops(whole, 100, 16) - 18 * sizes.num_layers * sizes.dim * 8 * sizes.expert_dim
    ours = training_flops(sizes, 100, 16) - 6 * routers - rest
    assert ours == (training_flops(whole, 100, 16) - rest) / 2
