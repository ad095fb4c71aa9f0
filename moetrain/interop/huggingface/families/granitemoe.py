"""Granite 3 MoE (IBM, 2024): factors of embedding, residual stream, attention and logits; fused experts."""

from moetrain.interop.huggingface.config_rules import Choice, Rotary, Same
from moetrain.interop.huggingface.families.base import Family, kv_heads, sizes_of
from moetrain.interop.huggingface.layer_names import Fused, LayerNames
from moetrain.interop.huggingface.router_rules import SoftmaxRouter


class Granitemoe(Family):
    """Granite 3 MoE."""

    model_type = "granitemoe"
    architecture = "GraniteMoeForCausalLM"
    rules = [
        *sizes_of(experts="num_local_experts", expert_dim="intermediate_size"),
        kv_heads(),
        Same("rms_norm_eps", "model.norm_eps", default=1e-6, kind=float),
        Choice("attention_bias", "model.attention_bias", {False: "none", True: "all"}, False),
        Rotary(),
        *(Same(name, f"model.{name}", default=1.0, kind=float) for name in (
            "embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")),
        SoftmaxRouter(),
    ]
    spellings = {
        "linear": LayerNames(router="block_sparse_moe.router.layer.weight",
                             experts=Fused("block_sparse_moe.input_linear.weight",
                                           "block_sparse_moe.output_linear.weight")),
        "fused": LayerNames(router="block_sparse_moe.router.weight",
                            experts=Fused("block_sparse_moe.experts.gate_up_proj",
                                          "block_sparse_moe.experts.down_proj")),
    }
