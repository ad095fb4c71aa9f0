"""Operations of training by formula, and peaks of chips; their ratio is the model FLOPs utilization (MFU).

The formula counts multiplications and additions of the matrix products of one token:

    forward     2 for each weight that the token is multiplied with: the experts that it takes in the mean,
                matrices beside them, router, attention, head; of a chain of experts in every round;
                head and block once more for each module of multi-token prediction, and the matrix that
                combines its inputs
                4 H h (S + 1) / 2 for each layer, scores and values of causal attention, each with its width
                where these differ, in which a token attends to half of the sequence on average, or to less
                in a sliding window
    backward    twice forward

Recomputation in backward does not count, nor do embedding, norms and activations. PaLM (arXiv 2204.02311,
appendix B) counts attention without the causal mask, so twice as much of it.

Shapes: S positions, H heads of width h, K experts per token.
"""

import re
from collections.abc import Mapping
from math import prod
from typing import Any

import torch

from moetrain.comm.mesh import Mesh
from moetrain.config.architecture import (
    attention_parameters,
    attention_top_k,
    beside_experts,
    expert_width,
    rounds,
)
from moetrain.config.expert_sizes import expert_sizes
from moetrain.config.layer_pattern import attention_window, block_paths, dense_width, is_sparse, per_layer
from moetrain.config.router_sizes import attention_router, layer_router
from moetrain.config.schema import SWIGLU, TOPK, Config, ModelConfig
from moetrain.model.build import compute_dtype, head_width

# Operations per second in dense bfloat16, from the data sheets. The first name that occurs in a chip's name
# counts, so longer names stand first.
BF16_PEAKS = {
    "H100 PCIe": 756e12, "H800 PCIe": 756e12, "H100 NVL": 835e12, "H200 NVL": 835e12,
    "H100": 989e12, "H200": 989e12, "GH200": 989e12, "H800": 989e12,
    "A100": 312e12, "A800": 312e12, "B200": 2250e12, "GB200": 2500e12,
}


def training_flops(sizes: ModelConfig, vocab_size: int, seq_len: int, expert: Mapping[str, Any] = SWIGLU,
                   router: Mapping[str, Any] = TOPK) -> float:
    """Operations of one token, forward and backward.

    Args:
        sizes: section `model` of the config.
        vocab_size: V, ids of the vocabulary.
        seq_len: S.
        expert: section `expert` of the config.
        router: section `router` of the config.
    """
    heads = (1 + sizes.mtp_layers) * 2 * sizes.dim * vocab_size
    forward = heads + sizes.mtp_layers * 4 * sizes.dim**2 + sum(
        _layer(sizes, layer, seq_len, expert, router) for _, layer in block_paths(sizes))
    return 3.0 * forward


def attended_keys(seq_len: int, window: int | None) -> float:
    """Keys that a query of causal attention attends to on average.

    Args:
        seq_len: S.
        window: keys that it attends to at most; None: no limit.
    """
    if window is None or window >= seq_len:
        return (seq_len + 1) / 2
    return window - window * (window - 1) / (2 * seq_len)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations per second of a device by its data sheet; None for CPUs, other dtypes and unknown chips."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    return named_peak(torch.cuda.get_device_name(device))


def peak_tokens_per_s(config: Config, vocab_size: int, mesh: Mesh) -> float | None:
    """Tokens per second of all ranks if their chips ran only the matrix products of training, at peak.

    Args:
        config: the config of the run.
        vocab_size: V, ids of the vocabulary.
        mesh: all ranks.

    Returns:
        The throughput; None if no peak is known, or if ranks share a GPU.
    """
    peak = None if config.run.share_gpu else peak_flops(mesh.device, compute_dtype(config, mesh.device))
    return peak and peak * mesh.size / training_flops(
        config.model, vocab_size, config.train.seq_len, config.expert, config.router)


def named_peak(chip: str) -> float | None:
    """Operations per second of a chip, by the name that its driver reports; None for a MIG instance."""
    if "MIG" in chip.split():
        return None
    return next((peak for name, peak in BF16_PEAKS.items() if re.search(rf"\b{name}\b", chip)), None)


def _layer(sizes: ModelConfig, layer: int, seq_len: int, expert: Mapping[str, Any],
           router: Mapping[str, Any]) -> float:
    """Operations of one token in the forward pass of a layer."""
    heads, h = sizes.num_heads, head_width(sizes)
    keys = attended_keys(seq_len, attention_window(sizes, layer))
    attention = 2 * sizes.dim * h * (2 * heads + 2 * sizes.num_kv_heads) + 4 * heads * h * keys
    if sizes.attention == "mla":
        attention = 2 * sum(prod(shape) for shape in attention_parameters(sizes).values() if len(shape) > 1)
        attention += heads * (seq_len + 1) * (
            sizes.qk_nope_head_dim + sizes.qk_rope_head_dim + sizes.v_head_dim)
    if sizes.attention == "sliced":                      # scores of all heads are computed, then masked
        attention = 8 * sizes.dim * h * attention_top_k(sizes) + 2 * heads * h * (seq_len + 1)
    if sizes.attention in ("experts", "sliced"):         # and a router
        attention += 2 * sum(map(prod, attention_router(router, sizes).matrices))
    if not is_sparse(sizes, layer):
        return attention + 6 * sizes.dim * dense_width(sizes, layer)
    one = expert_sizes(expert, expert_width(sizes), per_layer(sizes.expert_dim, layer)).in_matrices
    beside = sum(prod(shape) for shape in beside_experts(sizes, layer).values() if len(shape) > 1)
    chooses = layer_router(router, sizes, layer)
    return attention + 2 * rounds(sizes) * (
        sum(map(prod, chooses.matrices)) + beside + one * chooses.mean_experts)
