"""Qwen3-MoE (Qwen team, 2025, arXiv 2505.09388): q/k norm per head, experts in every n-th layer."""

from moetrain.interop.huggingface.config_rules import Choice, Implied, Rotary, Same, SparseStep, Window
from moetrain.interop.huggingface.families.base import Family, head_dim, kv_heads, sizes_of
from moetrain.interop.huggingface.layer_names import FUSED_SWIGLU, LayerNames, swiglu_experts
from moetrain.interop.huggingface.router_rules import SoftmaxRouter


class Qwen3Moe(Family):
    """Qwen3-MoE."""

    model_type = "qwen3_moe"
    architecture = "Qwen3MoeForCausalLM"
    rules = [
        *sizes_of(experts="num_experts", expert_dim="moe_intermediate_size", dense_dim="intermediate_size"),
        kv_heads(), head_dim(),
        Same("rms_norm_eps", "model.norm_eps", default=1e-6, kind=float),
        Implied({"model.qk_norm": "head"}),
        Choice("attention_bias", "model.attention_bias", {False: "none", True: "all"}, False),
        Rotary(),
        Window(switch="use_sliding_window", default=4096),
        SparseStep(),
        SoftmaxRouter(normalized=False),
    ]
    spellings = {
        "per_expert": LayerNames(router="mlp.gate.weight", experts=swiglu_experts("mlp.experts")),
        "fused": LayerNames(router="mlp.gate.weight", experts=FUSED_SWIGLU),
    }
