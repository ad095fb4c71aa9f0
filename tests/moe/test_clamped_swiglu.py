"""GPT-OSS's experts, and its biased router with them, beside their equations and beside transformers."""

import numpy as np
import torch

from moetrain.moe.layer import MoELayer
from tests.support.layer_equations import array, first_layer, softmax, tokens
from tests.support.stock_transformers import config_of, in_float64, stock

LIMIT, K = 0.3, 2                            # of pre-activations around 0.5, so every clamp is reached


def gpt_oss() -> MoELayer:
    """A layer whose biases are not those of the start."""
    layer = first_layer("expert=gpt_oss", f"expert.limit={LIMIT}", "router.logit_bias=true",
                        "model.init_std=0.2", f"model.top_k={K}")
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for bias in (layer.router.logit_bias, layer.experts.bank.gate_up_bias, layer.experts.bank.down_bias):
            assert not bias.any()
            bias.normal_(generator=draw)
    return layer


def test_it_is_the_equation_of_gpt_oss() -> None:
    layer, (x_TD, context) = gpt_oss(), tokens()
    bank, x = layer.experts.bank, array(x_TD)
    logits = x @ array(layer.router.weight).T + array(layer.router.logit_bias)
    expected = np.zeros_like(x)
    for token, z in enumerate(logits):
        chosen = np.argsort(-z)[:K]
        for weight, e in zip(softmax(z[chosen]), chosen):
            gate, up = np.split(array(bank.gate_up[e]) @ x[token] + array(bank.gate_up_bias[e]), 2)
            gate, up = np.minimum(gate, LIMIT), np.clip(up, -LIMIT, LIMIT)
            hidden = (up + 1) * gate / (1 + np.exp(-1.702 * gate))
            expected[token] += weight * (array(bank.down[e]) @ hidden + array(bank.down_bias[e]))
    np.testing.assert_allclose(array(layer(x_TD, context).out_TD), expected, rtol=1e-11)


def test_outputs_and_gradients_are_those_of_transformers() -> None:
    layer, (x_TD, context) = gpt_oss(), tokens()
    bank = layer.experts.bank
    config = config_of("gpt_oss", "GptOssConfig", hidden_size=x_TD.shape[1], num_experts_per_tok=K,
                       intermediate_size=bank.down.shape[2], num_local_experts=len(bank.down),
                       swiglu_limit=LIMIT)
    theirs = in_float64(stock("gpt_oss", "GptOssMLP")(config))
    names = {"router.weight": layer.router.weight, "router.bias": layer.router.logit_bias,
             "experts.gate_up_proj": bank.gate_up, "experts.gate_up_proj_bias": bank.gate_up_bias,
             "experts.down_proj": bank.down, "experts.down_proj_bias": bank.down_bias}
    theirs.load_state_dict({name: as_gpt_oss(name, ours.detach()) for name, ours in names.items()})
    other_TD = x_TD.detach().clone().requires_grad_()
    out_TD, expected_TD = layer(x_TD, context).out_TD, theirs(other_TD[None])[0][0]
    torch.testing.assert_close(out_TD, expected_TD, rtol=1e-11, atol=1e-13)
    for out in (out_TD, expected_TD):
        out.square().sum().backward()
    torch.testing.assert_close(x_TD.grad, other_TD.grad, rtol=1e-10, atol=1e-12)
    for name, ours in names.items():
        torch.testing.assert_close(as_gpt_oss(name, ours.grad), theirs.get_parameter(name).grad, rtol=1e-10,
                                   atol=1e-12)


def as_gpt_oss(name: str, ours: torch.Tensor) -> torch.Tensor:
    """Our tensor [e, …] of all experts in GPT-OSS's layout: input-major, gate and up interleaved."""
    if "gate_up" in name:
        gate, up = ours.chunk(2, dim=1)
        ours = torch.stack([gate, up], dim=2).flatten(1, 2)
    return ours.mT if ours.dim() == 3 else ours
