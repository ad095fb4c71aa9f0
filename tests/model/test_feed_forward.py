"""The shared expert with a gate of Qwen1.5-MoE, beside its equation and beside transformers' layer."""

import numpy as np
import pytest
import torch

from moetrain.moe.layer import MoELayer
from tests.support.layer_equations import array, first_layer, swiglu, tokens, top_k_mixture
from tests.support.stock_transformers import config_of, in_float64, stock

K, SHARED = 2, 20


def qwen(weights: str = "raw") -> MoELayer:
    return first_layer("model.num_shared_experts=1", f"model.shared_dim={SHARED}", "model.shared_gate=true",
                       f"model.top_k={K}", f"router.weights={weights}", "model.init_std=0.3")


def test_the_gate_multiplies_the_shared_expert_alone() -> None:
    layer, (x_TD, context) = qwen(), tokens()
    x, shared = array(x_TD), layer.shared
    gate = 1 / (1 + np.exp(-x @ array(shared.gate.weight).T))
    expected = top_k_mixture(layer, x, K) + gate * swiglu(shared.gate_up.weight, shared.down.weight, x)
    np.testing.assert_allclose(array(layer(x_TD, context).out_TD), expected, rtol=1e-10)


@pytest.mark.parametrize("weights", ["raw", "renorm"])
def test_outputs_and_gradients_are_those_of_transformers(weights: str) -> None:
    layer, (x_TD, context) = qwen(weights), tokens()
    bank, shared = layer.experts.bank, layer.shared
    config = config_of("qwen2_moe", "Qwen2MoeConfig", hidden_size=x_TD.shape[1], num_experts_per_tok=K,
                       moe_intermediate_size=bank.down.shape[2], num_experts=len(bank.down),
                       shared_expert_intermediate_size=SHARED, norm_topk_prob=weights == "renorm")
    theirs = in_float64(stock("qwen2_moe", "Qwen2MoeSparseMoeBlock")(config))

    def as_qwen(of) -> dict[str, torch.Tensor]:
        """Our tensors, or their gradients, by its names."""
        gate, up = of(shared.gate_up.weight).chunk(2)
        return {"gate.weight": of(layer.router.weight), "experts.gate_up_proj": of(bank.gate_up),
                "experts.down_proj": of(bank.down), "shared_expert.gate_proj.weight": gate,
                "shared_expert.up_proj.weight": up, "shared_expert.down_proj.weight": of(shared.down.weight),
                "shared_expert_gate.weight": of(shared.gate.weight)}

    theirs.load_state_dict(as_qwen(torch.Tensor.detach))
    other_TD = x_TD.detach().clone().requires_grad_()
    out_TD, expected_TD = layer(x_TD, context).out_TD, theirs(other_TD[None])[0]
    torch.testing.assert_close(out_TD, expected_TD, rtol=1e-10, atol=1e-12)
    for out in (out_TD, expected_TD):
        out.square().sum().backward()
    torch.testing.assert_close(x_TD.grad, other_TD.grad, rtol=1e-10, atol=1e-12)
    for name, ours in as_qwen(lambda tensor: tensor.grad).items():
        torch.testing.assert_close(ours, theirs.get_parameter(name).grad, rtol=1e-10, atol=1e-12)
