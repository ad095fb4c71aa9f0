"""Numpy versions of what layers are made of, for tests that write an architecture as its paper does."""

import numpy as np
import torch
from torch import Tensor

from moetrain.model.transformer import Block
from moetrain.moe.layer import MoELayer
from moetrain.routers.base import RouterContext
from tests.support.training import make_run

TOKENS, DIM = 9, 16


def first_layer(*overrides: str) -> MoELayer:
    """First layer with experts of a tiny model in float64."""
    return first_block(*overrides).moe


def first_block(*overrides: str) -> Block:
    """First block of a tiny model in float64."""
    return make_run(["run.dtype=float64", *overrides]).state.model.layers[0]


def tokens(dim: int = DIM) -> tuple[Tensor, RouterContext]:
    """Inputs of a layer, with a place for their gradient, and their context."""
    x_TD = torch.randn(TOKENS, dim, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return x_TD.requires_grad_(), RouterContext(positions_T=torch.arange(TOKENS))


def array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy()


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def swiglu(gate_up: Tensor, down: Tensor, x: np.ndarray) -> np.ndarray:
    """SwiGLU of vectors x [..., D]."""
    gate, up = np.split(x @ array(gate_up).T, 2, -1)
    return (gate / (1 + np.exp(-gate)) * up) @ array(down).T


def top_k_mixture(layer: MoELayer, x_TD: np.ndarray, top_k: int,
                  inputs: np.ndarray | None = None) -> np.ndarray:
    """Sum of each token's experts by raw probabilities; `inputs` [T, I] are those of the experts, else x."""
    inputs, bank = x_TD if inputs is None else inputs, layer.experts.bank
    probs_TE, out = softmax(x_TD @ array(layer.router.weight).T), []
    for probs_E, x in zip(probs_TE, inputs, strict=True):
        chosen = np.argsort(-probs_E, kind="stable")[:top_k]
        out.append(sum(probs_E[e] * swiglu(bank.gate_up[e], bank.down[e], x) for e in chosen))
    return np.stack(out)
