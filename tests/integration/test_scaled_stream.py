"""Phi's norms and head with biases, Granite's multipliers: a forward pass in numpy, and the loss in chunks.

Granite: embedding_multiplier x, x + residual_multiplier f(norm(x)), logits / logits_scaling (Hugging Face's
description of GraniteMoe). Phi: LayerNorm with a bias, logits with a bias.
"""

import numpy as np
import pytest
import torch

from moetrain.train.micro_batches import step_context
from tests.support.training import alone, make_run

OPTIONS = ["run.dtype=float64", "model.norm=layer", "model.norm_eps=0.01", "model.head_bias=true",
           "model.embedding_multiplier=3", "model.residual_multiplier=0.5", "model.logits_scaling=2",
           "model.num_layers=2", "model.first_dense_layers=2", "model.dense_dim=8", "model.num_kv_heads=4",
           "model.partial_rotary_factor=0.5"]


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def in_numpy(p: dict[str, np.ndarray], ids_S: np.ndarray) -> np.ndarray:
    """Logits of one sequence: heads of width 4, of which the first pair of channels turns."""
    def norm(x, name):
        centered = x - x.mean(-1, keepdims=True)
        return (centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 0.01) * p[f"{name}.weight"]
                + p[f"{name}.bias"])

    x, angles, S = 3 * p["embed"][ids_S], np.arange(len(ids_S)), len(ids_S)
    for path in ("layers.0.", "layers.1."):
        qkv = (norm(x, f"{path}attention_norm") @ p[f"{path}attention.qkv.weight"].T).reshape(S, 12, 4)
        heads = []
        for head in range(4):
            q, k = qkv[:, head], qkv[:, 4 + head]
            q, k = (np.stack([t[:, 0] * np.cos(angles) - t[:, 1] * np.sin(angles),
                              t[:, 1] * np.cos(angles) + t[:, 0] * np.sin(angles), t[:, 2], t[:, 3]], -1)
                    for t in (q, k))
            scores = np.where(np.tri(S, dtype=bool), q @ k.T / 2, -np.inf)
            heads.append(softmax(scores) @ qkv[:, 8 + head])
        x = x + 0.5 * np.concatenate(heads, -1) @ p[f"{path}attention.out.weight"].T
        gate, up = np.split(norm(x, f"{path}ffn_norm") @ p[f"{path}ffn.gate_up.weight"].T, 2, -1)
        x = x + 0.5 * (gate / (1 + np.exp(-gate)) * up) @ p[f"{path}ffn.down.weight"].T
    return (norm(x, "norm") @ p["head"].T + p["head_bias"]) / 2


def test_logits_are_those_of_numpy() -> None:
    run = make_run(OPTIONS)
    model, batch = run.state.model, next(iter(run.loader.step(1)))
    with torch.no_grad():
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if name.endswith("bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(index))
        logits_BSV = model(batch.tokens_BS, step_context(0, 1, batch)).logits_BSV
    parameters = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    for logits_SV, ids_S in zip(logits_BSV[:3], batch.tokens_BS.numpy()):
        np.testing.assert_allclose(logits_SV.numpy(), in_numpy(parameters, ids_S), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("option", ["model.head_bias=false", "model.logits_scaling=2"])
def test_a_head_in_chunks_trains_the_same(option: str) -> None:
    whole, chunks = (alone([*OPTIONS, option, f"train.head_chunk={chunk}"], 2) for chunk in (0, 7))
    for name, parameter in whole.parameters.items():
        torch.testing.assert_close(chunks.parameters[name], parameter, rtol=1e-10, atol=1e-12)
    assert chunks.metrics[-1]["loss/ce"] == pytest.approx(whole.metrics[-1]["loss/ce"], rel=1e-12)
