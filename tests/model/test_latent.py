"""LatentMoE against its equation."""

import numpy as np
import torch

from tests.support.layer_equations import array, first_layer, swiglu, tokens, top_k_mixture


def test_the_layer_is_its_equation() -> None:
    """The router and shared experts read x; experts work on W_down x, and W_up maps their sum back."""
    words = ["model.block=latent", "model.latent_dim=6", "router.weights=raw", "model.num_shared_experts=1"]
    layer, (x_TD, context) = first_layer(*words), tokens()
    x, down, up = array(x_TD), array(layer.latent.down.weight), array(layer.latent.up.weight)
    assert down.shape == (6, 16) and layer.experts.bank.gate_up.shape == (8, 32, 6)
    expected = (top_k_mixture(layer, x, 2, inputs=x @ down.T) @ up.T
                + swiglu(layer.shared.gate_up.weight, layer.shared.down.weight, x))
    np.testing.assert_allclose(array(layer(x_TD, context).out_TD), expected, rtol=1e-11)


def test_identity_projections_are_the_plain_layer() -> None:
    plain, latent = first_layer(), first_layer("model.block=latent", "model.latent_dim=16")
    identity = torch.eye(16, dtype=torch.float64)
    ends = dict.fromkeys(("latent.down.weight", "latent.up.weight"), identity)
    latent.load_state_dict({**plain.state_dict(), **ends})
    x_TD, context = tokens()
    outs = (array(layer(x_TD, context).out_TD) for layer in (latent, plain))
    np.testing.assert_allclose(*outs, rtol=1e-12)
