"""What `model.block` makes of a layer with experts, in shapes. model/architecture.py builds the modules.

    plain      experts, and the shared experts beside them
    residual   a dense network of an expert's shape beside them, too (DeepSpeed-MoE, OpenMoE)
    latent     experts in a narrower space, between two projections (LatentMoE)
    sliced     experts that are slices of one dense network (Union-of-Experts)
    chain      several rounds through all of it, with a router for each (Chain-of-Experts)

Estimates of memory and operations, and lists of parameters, ask here. No torch.
"""

from moetrain.config.layer_pattern import per_layer, shared_width
from moetrain.config.schema import ModelConfig

Shapes = dict[str, tuple[int, ...]]


def beside_experts(sizes: ModelConfig, layer: int) -> Shapes:
    """Shapes of the parameters of a layer that are neither of its router nor of its experts.

    Args:
        sizes: section `model` of the config.
        layer: a layer with experts.

    Returns:
        Shapes by the name below the layer.
    """
    width = sizes.dim
    shapes = _feed_forward("shared", width, shared_width(sizes, layer))
    if shapes and sizes.shared_gate:
        shapes["shared.gate.weight"] = (1, width)
    if sizes.block == "residual":
        shapes |= _feed_forward("residual.dense", width, residual_width(sizes, layer))
        if sizes.residual_mixing == "learned":
            shapes |= {"residual.mixing.weight": (2, width), "residual.mixing.bias": (2,)}
    if sizes.block == "latent":
        shapes |= {"latent.down.weight": (expert_width(sizes), width),
                   "latent.up.weight": (width, expert_width(sizes))}
    return shapes


def expert_width(sizes: ModelConfig) -> int:
    """Width of the tokens that experts are given: that of the model but for latent ones."""
    if sizes.block != "latent":
        return sizes.dim
    return sizes.latent_dim or max(1, sizes.dim // 4)


def dense_beside(sizes: ModelConfig, layer: int) -> int:
    """Hidden width of the dense networks beside the experts of a layer, together."""
    return shared_width(sizes, layer) + (residual_width(sizes, layer) if sizes.block == "residual" else 0)


def attention_parameters(sizes: ModelConfig) -> Shapes:
    """Shapes of the attention's parameters in a block, by the name below it, without router and experts."""
    if sizes.attention == "mla":
        return _latent_attention(sizes)
    head = sizes.head_dim or sizes.dim // sizes.num_heads
    queries, keys = sizes.num_heads * head, sizes.num_kv_heads * head
    if sizes.attention == "experts":
        return {"kv.weight": (2 * keys, sizes.dim)}
    if sizes.attention == "sliced":
        return {}
    shapes: Shapes = {"qkv.weight": (queries + 2 * keys, sizes.dim), "out.weight": (sizes.dim, queries)}
    if sizes.attention_bias != "none":
        shapes |= {"qkv.bias": (queries + 2 * keys,)}
    if sizes.attention_bias == "all":
        shapes |= {"out.bias": (sizes.dim,)}
    if sizes.qk_norm != "none":
        q_width, k_width = (queries, keys) if sizes.qk_norm == "all" else (head, head)
        shapes |= {"q_norm.weight": (q_width,), "k_norm.weight": (k_width,)}
    return shapes | ({"sinks": (sizes.num_heads,)} if sizes.attention_sinks else {})


def attention_experts(sizes: ModelConfig) -> Shapes:
    """Shapes of the parameters of one attention expert, by name; none with plain attention."""
    head = sizes.head_dim or sizes.dim // sizes.num_heads
    if sizes.attention == "sliced":
        return {"qkv": (3 * head, sizes.dim), "out": (sizes.dim, head)}
    if sizes.attention != "experts":
        return {}
    keys = sizes.num_kv_heads * head
    return {"queries": (keys, sizes.dim), "outputs": (sizes.dim, keys)}


def num_attention_experts(sizes: ModelConfig) -> int:
    """Attention experts of a layer: as configured, or the heads where these are sliced."""
    return sizes.num_heads if sizes.attention == "sliced" else sizes.num_attention_experts


def attention_top_k(sizes: ModelConfig) -> int:
    """Attention experts of a token: those that together have its query heads, or its slices, half of all."""
    if sizes.attention == "sliced":
        return sizes.top_k_heads or max(1, sizes.num_heads // 2)
    return sizes.num_heads // sizes.num_kv_heads


def mtp_beside(sizes: ModelConfig) -> Shapes:
    """Shapes of the parameters of a multi-token prediction module beside those of its block."""
    norms = {f"{norm}.{tensor}": (sizes.dim,)
             for norm in ("enorm", "hnorm", "norm") for tensor in norm_tensors(sizes)}
    return {**norms, "eh_proj.weight": (sizes.dim, 2 * sizes.dim)}


def norm_tensors(sizes: ModelConfig) -> tuple[str, ...]:
    """Names of the parameters of a block's norm, and of the last one, each as long as the model is wide."""
    return ("weight", "bias") if sizes.norm == "layer" else ("weight",)


def rounds(sizes: ModelConfig) -> int:
    """How often a token passes through the experts of a layer, and what is beside them."""
    return sizes.chain_rounds if sizes.block == "chain" else 1


def router_paths(sizes: ModelConfig) -> list[str]:
    """Paths below a layer of its routers that have parameters of their own."""
    if sizes.block != "chain":
        return ["router"]
    return [f"router.{number}" for number in range(1 if sizes.chain_share_router else sizes.chain_rounds)]


def residual_width(sizes: ModelConfig, layer: int) -> int:
    """Hidden width of the dense network of a residual block: that of one expert."""
    return per_layer(sizes.expert_dim, layer)


def _latent_attention(sizes: ModelConfig) -> Shapes:
    """Shapes of model/latent_attention.py."""
    width, latent, heads = sizes.dim, sizes.kv_lora_rank, sizes.num_heads
    queries = heads * (sizes.qk_nope_head_dim + sizes.qk_rope_head_dim)
    shapes: Shapes = {"q.weight": (queries, width)}
    if sizes.q_lora_rank is not None:
        shapes = {"q_a.weight": (sizes.q_lora_rank, width), "q_a_norm.weight": (sizes.q_lora_rank,),
                  "q_b.weight": (queries, sizes.q_lora_rank)}
    if sizes.attention_bias != "none":
        shapes |= {"kv_a.bias": (latent + sizes.qk_rope_head_dim,)}
        shapes |= {"q_a.bias": (sizes.q_lora_rank,)} if sizes.q_lora_rank is not None else {}
    if sizes.attention_bias == "all":
        shapes |= {"out.bias": (width,)}
    return shapes | {"kv_a.weight": (latent + sizes.qk_rope_head_dim, width), "kv_a_norm.weight": (latent,),
                     "kv_b.weight": (heads * (sizes.qk_nope_head_dim + sizes.v_head_dim), latent),
                     "out.weight": (width, heads * sizes.v_head_dim)}


def _feed_forward(name: str, width: int, hidden: int) -> Shapes:
    """Shapes of a dense SwiGLU network (model/feed_forward.py); none without width."""
    if not hidden:
        return {}
    return {f"{name}.gate_up.weight": (2 * hidden, width), f"{name}.down.weight": (width, hidden)}
