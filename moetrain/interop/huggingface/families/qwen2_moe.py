"""Qwen1.5-MoE and Qwen2-MoE (arXiv 2407.10671): biases of q, k and v, a shared expert with a sigmoid gate."""

from collections.abc import Mapping
from typing import Any

from moetrain.interop.huggingface.config_rules import (
    Choice,
    Implied,
    Rotary,
    Same,
    SparseStep,
    Window,
)
from moetrain.interop.huggingface.families.base import Family, kv_heads, sizes_of
from moetrain.interop.huggingface.layer_names import FUSED_SWIGLU, LayerNames, swiglu_experts
from moetrain.interop.huggingface.router_rules import SoftmaxRouter


def sliding_layers(theirs: Mapping[str, Any]) -> list[int]:
    """Layers with a window of a file that does not list them: every second of the first max_window_layers."""
    return list(range(0, min(theirs["num_hidden_layers"], theirs.get("max_window_layers", 28)), 2))


class Qwen2Moe(Family):
    """Qwen2-MoE."""

    model_type = "qwen2_moe"
    architecture = "Qwen2MoeForCausalLM"
    rules = [
        *sizes_of(experts="num_experts", expert_dim="moe_intermediate_size", dense_dim="intermediate_size"),
        kv_heads(),
        Same("rms_norm_eps", "model.norm_eps", default=1e-6, kind=float),
        Choice("qkv_bias", "model.attention_bias", {False: "none", True: "qkv"}, True),
        Rotary(),
        Window(layer_types=sliding_layers, switch="use_sliding_window", default=4096),
        SparseStep(),
        Implied({"model.num_shared_experts": 1, "model.shared_gate": True}),
        Same("shared_expert_intermediate_size", "model.shared_dim", default=5632),
        SoftmaxRouter(normalized=False),
    ]
    _shared = {"shared": "mlp.shared_expert", "shared_gate": "mlp.shared_expert_gate.weight"}
    spellings = {
        "per_expert": LayerNames(router="mlp.gate.weight", experts=swiglu_experts("mlp.experts"), **_shared),
        "fused": LayerNames(router="mlp.gate.weight", experts=FUSED_SWIGLU, **_shared),
    }
