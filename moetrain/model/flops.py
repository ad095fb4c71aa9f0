"""Operations of training by formula, and what a chip could do: model FLOPs utilisation (MFU) is one over the other.

Counted are the multiplications and additions of the products that a token takes part in, forward: 2 for every weight that it meets (of
its K experts, the shared ones, router, attention, head), and 4 H h (S + 1) / 2 a layer for scores and values of causal attention, where it
looks at half of the sequence on average. Backward is twice forward. What is computed again in backward does not count, nor do
embedding, norms and activations. (PaLM, arXiv 2204.02311, appendix B, counts attention without the mask, so twice as much of it.)

Shapes: S positions, H heads of width h, K experts a token.
"""

import re

import torch

from moetrain.comm.mesh import Mesh
from moetrain.config.schema import Config, ModelConfig
from moetrain.model.build import compute_dtype, dense_width, head_width, per_layer

BF16_PEAKS = {                               # dense bfloat16, operations a second, from the data sheets
    "H100 PCIe": 756e12, "H800 PCIe": 756e12, "H100 NVL": 835e12, "H200 NVL": 835e12,           # before those that their names begin with
    "H100": 989e12, "H200": 989e12, "GH200": 989e12, "H800": 989e12,
    "A100": 312e12, "A800": 312e12, "B200": 2250e12, "GB200": 2500e12,
}


def training_flops(sizes: ModelConfig, vocab_size: int, seq_len: int) -> float:
    """Of one token, forward and backward."""
    forward = 2 * sizes.dim * vocab_size + sum(_layer(sizes, layer, seq_len) for layer in range(sizes.num_layers))
    return 3.0 * forward


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """What the data sheet promises, operations a second; None where no figure is known (any CPU, other dtypes)."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    return named_peak(torch.cuda.get_device_name(device))


def peak_tokens_per_s(config: Config, vocab_size: int, mesh: Mesh) -> float | None:
    """Tokens per second of all ranks, if chips did nothing but the matrix products of training at their peak.

    None where no peak is known.
    """
    peak = None if config.run.share_gpu else peak_flops(mesh.device, compute_dtype(config, mesh.device))
    return peak and peak * mesh.size / training_flops(config.model, vocab_size, config.train.seq_len)


def named_peak(chip: str) -> float | None:
    """By the name that the driver gives; None for a slice of a chip (MIG)."""
    if "MIG" in chip.split():
        return None
    return next((peak for name, peak in BF16_PEAKS.items() if re.search(rf"\b{name}\b", chip)), None)


def _layer(sizes: ModelConfig, layer: int, seq_len: int) -> float:
    heads, h = sizes.num_heads, head_width(sizes)
    attention = 2 * sizes.dim * h * (2 * heads + 2 * sizes.num_kv_heads) + 2 * heads * h * (seq_len + 1)
    if layer < sizes.first_dense_layers:
        return attention + 6 * sizes.dim * dense_width(sizes, layer)
    experts = per_layer(sizes.top_k, layer) + sizes.num_shared_experts
    return attention + 2 * sizes.dim * per_layer(sizes.num_experts, layer) + 6 * sizes.dim * sizes.expert_dim * experts
