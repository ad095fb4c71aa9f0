"""Forward passes of public families in numpy, from their papers and published formulas: logits of tokens.

    logits = forward(config, tensors, tokens)      config.json, tensors of its folder by name, ids [S]

It reads the keys and names of the folder itself, and shares nothing with the package: neither tables nor
operations. One token after the other in the experts, one head after the other in attention. No cache, no
batch. Where a family differs from plain pre-norm blocks with grouped-query attention and SwiGLU experts, a
line says so.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

Array = np.ndarray
Tensors = Mapping[str, Array]


def forward(config: Mapping[str, Any], tensors: Tensors, tokens: Array) -> Array:
    """Logits [S, V] of one sequence.

    Args:
        config: config.json.
        tensors: of the folder, by name, float64.
        tokens: ids [S].
    """
    x = tensors["model.embed_tokens.weight"][tokens] * config.get("embedding_multiplier", 1)
    for layer in range(config["num_hidden_layers"]):
        path, factor = f"model.layers.{layer}.", config.get("residual_multiplier", 1)
        normed = norm(config, tensors, path + "input_layernorm", x)
        x = x + factor * (latent_attention if "kv_lora_rank" in config else attention)(
            config, tensors, path + "self_attn.", normed, layer)
        x = x + factor * feed_forward(config, tensors, path, norm(
            config, tensors, path + "post_attention_layernorm", x))
    x = norm(config, tensors, "model.norm", x)
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    return (x @ head.T + tensors.get("lm_head.bias", 0)) / config.get("logits_scaling", 1)


def norm(config: Mapping[str, Any], tensors: Tensors, name: str, x: Array) -> Array:
    """RMSNorm, or LayerNorm where the file has a bias of it (Phi-3.5-MoE)."""
    bias = tensors.get(f"{name}.bias")
    x = x if bias is None else x - x.mean(-1, keepdims=True)
    scaled = x / np.sqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"])
    return scaled * tensors[f"{name}.weight"] + (0 if bias is None else bias)


def linear(tensors: Tensors, name: str, x: Array) -> Array:
    return x @ tensors[f"{name}.weight"].T + tensors.get(f"{name}.bias", 0)


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rotary(config: Mapping[str, Any], width: int) -> tuple[Array, float]:
    """Angle of a position in each pair of channels, and the factor of cos and sin."""
    said = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind, theta = said.get("rope_type", "default"), said.get("rope_theta", config.get("rope_theta"))
    angles = theta ** (-np.arange(0, width, 2) / width)
    if kind == "yarn":                                   # Peng et al. 2023, arXiv 2309.00071
        first, factor = said["original_max_position_embeddings"], said["factor"]
        low, high = (width * math.log(first / (turns * 2 * math.pi)) / (2 * math.log(theta))
                     for turns in (said.get("beta_fast", 32), said.get("beta_slow", 1)))
        if said.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        ramp = np.clip((np.arange(width // 2) - low) / max(high - low, 1e-3), 0, 1)
        scale = 0.1 * math.log(factor) + 1
        if said.get("mscale"):
            scale = ((0.1 * said["mscale"] * math.log(factor) + 1)
                     / (0.1 * said["mscale_all_dim"] * math.log(factor) + 1))
        return angles / factor * ramp + angles * (1 - ramp), scale
    if kind == "longrope":                               # within the original length; arXiv 2402.13753
        return angles / np.array(said["short_factor"]), said["short_mscale"]
    return angles, 1.0


def rotate(config: Mapping[str, Any], x: Array, *, interleaved: bool = False) -> Array:
    """Rotate the first channels of x [S, h], all of them unless the file has partial_rotary_factor."""
    said = config.get("rope_parameters") or config
    width = int(x.shape[-1] * said.get("partial_rotary_factor", 1))
    angles, factor = rotary(config, width)
    turns = np.outer(np.arange(len(x)), angles)
    cos, sin = np.cos(turns) * factor, np.sin(turns) * factor
    a, b = (x[:, 0:width:2], x[:, 1:width:2]) if interleaved else (x[:, :width // 2], x[:, width // 2:width])
    # Where pairs lie side by side, halves come out: queries and keys alike, so that products are the same.
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, x[:, width:]], -1)


def attend(config: Mapping[str, Any], q: Array, k: Array, v: Array, scale: float, layer: int,
           sink: float | None = None) -> Array:
    """One head: causal, in a window where the layer has one, with a sink (GPT-OSS) where it has one."""
    logits = q @ k.T * scale
    back = np.arange(len(q))[:, None] - np.arange(len(k))
    kinds = config.get("layer_types")
    window = config.get("sliding_window") if kinds is None or kinds[layer] == "sliding_attention" else None
    logits[(back < 0) | (back >= (window or len(q)))] = -np.inf
    if sink is not None:
        return softmax(np.concatenate([logits, np.full((len(q), 1), sink)], 1))[:, :-1] @ v
    return softmax(logits) @ v


def attention(config: Mapping[str, Any], tensors: Tensors, path: str, x: Array, layer: int) -> Array:
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    q, k, v = (linear(tensors, f"{path}{name}_proj", x) for name in "qkv")
    if config["model_type"] == "olmoe":                  # over all heads together, then clipped
        q, k = norm(config, tensors, path + "q_norm", q), norm(config, tensors, path + "k_norm", k)
        clip = config.get("clip_qkv") or np.inf
        q, k, v = (np.clip(part, -clip, clip) for part in (q, k, v))
    out = []
    for head in range(heads):
        group = head // (heads // groups)
        one, key = q[:, head * width:][:, :width], k[:, group * width:][:, :width]
        if config["model_type"] == "qwen3_moe" or config.get("use_qk_norm"):
            one, key = (norm(config, tensors, path + "q_norm", one),
                        norm(config, tensors, path + "k_norm", key))
        sink = tensors.get(f"{path}sinks")
        out.append(attend(config, rotate(config, one), rotate(config, key),
                          v[:, group * width:][:, :width],
                          config.get("attention_multiplier", width ** -0.5), layer,
                          None if sink is None else sink[head]))
    return linear(tensors, path + "o_proj", np.concatenate(out, 1))


def latent_attention(config: Mapping[str, Any], tensors: Tensors, path: str, x: Array, layer: int) -> Array:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, equations 9 to 19)."""
    plain, turned, value = (config[name] for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    rank, pairs = config["kv_lora_rank"], config.get("rope_interleave", True)
    if config["q_lora_rank"] is None:
        q = linear(tensors, path + "q_proj", x)
    else:
        q = linear(tensors, path + "q_b_proj", norm(config, tensors, path + "q_a_layernorm",
                                                    linear(tensors, path + "q_a_proj", x)))
    down = linear(tensors, path + "kv_a_proj_with_mqa", x)
    kv = linear(tensors, path + "kv_b_proj", norm(config, tensors, path + "kv_a_layernorm", down[:, :rank]))
    shared_key = rotate(config, down[:, rank:], interleaved=pairs)
    said, scale = config.get("rope_scaling") or config.get("rope_parameters") or {}, (plain + turned) ** -0.5
    if said.get("mscale_all_dim"):
        scale *= (0.1 * said["mscale_all_dim"] * math.log(said["factor"]) + 1) ** 2
    out = []
    for head in range(config["num_attention_heads"]):
        one, both = q[:, head * (plain + turned):], kv[:, head * (plain + value):]
        query = np.concatenate([one[:, :plain], rotate(config, one[:, plain:plain + turned],
                                                       interleaved=pairs)], 1)
        key = np.concatenate([both[:, :plain], shared_key], 1)
        out.append(attend(config, query, key, both[:, plain:plain + value], scale, layer))
    return linear(tensors, path + "o_proj", np.concatenate(out, 1))


def feed_forward(config: Mapping[str, Any], tensors: Tensors, path: str, x: Array) -> Array:
    """Dense network, or routed experts with what is beside them."""
    if f"{path}mlp.gate_proj.weight" in tensors:
        return network(tensors, f"{path}mlp.", x)
    names = [f"{path}{name}.weight" for name in ("block_sparse_moe.gate", "mlp.gate", "mlp.router",
                                                 "block_sparse_moe.router.layer")]
    router = next(name for name in names if name in tensors)
    out = np.zeros_like(x)
    for token, logits in enumerate(x @ tensors[router].T):
        for expert, weight in choose(config, tensors, router, logits):
            out[token] += weight * expert_output(config, tensors, path, expert, x[token])
    if f"{path}mlp.shared_experts.gate_proj.weight" in tensors:
        out += network(tensors, f"{path}mlp.shared_experts.", x)
    if f"{path}mlp.shared_expert_gate.weight" in tensors:                        # Qwen2-MoE
        gate = 1 / (1 + np.exp(-linear(tensors, f"{path}mlp.shared_expert_gate", x)))
        out += gate * network(tensors, f"{path}mlp.shared_expert.", x)
    return out


def network(tensors: Tensors, path: str, x: Array) -> Array:
    gate, up = (linear(tensors, f"{path}{name}_proj", x) for name in ("gate", "up"))
    return linear(tensors, f"{path}down_proj", silu(gate) * up)


def choose(config: Mapping[str, Any], tensors: Tensors, router: str,
           logits: Array) -> list[tuple[int, float]]:
    """Experts of a token and their weights."""
    kind, k = config["model_type"], config["num_experts_per_tok"]
    if kind == "phimoe":
        return sparsemixer(logits, config["router_jitter_noise"])
    bias = tensors.get(router.replace(".weight", ".e_score_correction_bias"), np.zeros(len(logits)))
    logits = logits + tensors.get(router.replace(".weight", ".bias"), 0)         # GPT-OSS
    sigmoid = kind in ("deepseek_v3", "glm4_moe")
    scores = 1 / (1 + np.exp(-logits)) if sigmoid else softmax(logits)
    order, groups = scores + bias, config.get("n_group") or 1
    if groups > 1:                                       # V2: its best expert counts; V3: its two best
        of_group = np.sort(order.reshape(groups, -1), 1)[:, -2 if sigmoid else -1:].sum(1)
        best = np.argsort(-of_group)[:config["topk_group"]]
        order = np.where(np.isin(np.arange(len(order)) // (len(order) // groups), best), order, -np.inf)
    ids = np.argsort(-order)[:k]
    weights = scores[ids]
    if config.get("norm_topk_prob", kind in ("mixtral", "gpt_oss", "granitemoe")):
        weights = weights / weights.sum()
    return list(zip(ids, weights * config.get("routed_scaling_factor", 1)))


def sparsemixer(logits: Array, reach: float) -> list[tuple[int, float]]:
    """Phi-3.5-MoE in evaluation (arXiv 2409.12136): the best, twice, by softmaxes of those in reach."""
    left, out = logits.copy(), []
    for _ in range(2):
        best = left.max()
        near = np.where((best - logits) / np.maximum(np.abs(logits), best) > 2 * reach, -np.inf, left)
        out.append((int(left.argmax()), float(softmax(near)[left.argmax()])))
        left[left.argmax()] = -np.inf
    return out


def expert_output(config: Mapping[str, Any], tensors: Tensors, path: str, expert: int, x: Array) -> Array:
    if f"{path}mlp.experts.gate_up_proj_bias" in tensors:                        # GPT-OSS
        own = {name: tensors[f"{path}mlp.experts.{name}"][expert]
               for name in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")}
        both, limit = x @ own["gate_up_proj"] + own["gate_up_proj_bias"], config["swiglu_limit"]
        gate, up = np.minimum(both[0::2], limit), np.clip(both[1::2], -limit, limit)
        hidden = (up + 1) * gate / (1 + np.exp(-config["swiglu_alpha"] * gate))
        return hidden @ own["down_proj"] + own["down_proj_bias"]
    if f"{path}block_sparse_moe.input_linear.weight" in tensors:                 # Granite
        gate, up = np.split(tensors[f"{path}block_sparse_moe.input_linear.weight"][expert] @ x, 2)
        return tensors[f"{path}block_sparse_moe.output_linear.weight"][expert] @ (silu(gate) * up)
    if f"{path}mlp.experts.{expert}.gate_proj.weight" in tensors:
        return network(tensors, f"{path}mlp.experts.{expert}.", x)
    w1, w2, w3 = (tensors[f"{path}block_sparse_moe.experts.{expert}.w{part}.weight"] for part in (1, 2, 3))
    return w2 @ (silu(w1 @ x) * (w3 @ x))
