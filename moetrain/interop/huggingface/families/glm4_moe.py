"""GLM-4.5 and GLM-4.5-Air (2025, arXiv 2508.06471): V3's router, grouped-query attention, half-rotated heads.

Its files hold a multi-token-prediction module as the layer behind the last (`num_nextn_predict_layers`).
"""

from moetrain.interop.huggingface.config_rules import (
    Choice,
    DenseFirst,
    FurtherTokens,
    Rotary,
    Same,
    SharedExperts,
)
from moetrain.interop.huggingface.families.base import Family, head_dim, kv_heads, sizes_of
from moetrain.interop.huggingface.families.deepseek_v3 import PARTS
from moetrain.interop.huggingface.layer_names import FUSED_SWIGLU, LayerNames, swiglu_experts
from moetrain.interop.huggingface.router_rules import SigmoidRouter


class Glm4Moe(Family):
    """GLM-4.5."""

    model_type = "glm4_moe"
    architecture = "Glm4MoeForCausalLM"
    predicts_further = True
    rules = [
        *sizes_of(experts="n_routed_experts", expert_dim="moe_intermediate_size",
                  dense_dim="intermediate_size"),
        kv_heads(), head_dim(),
        Same("rms_norm_eps", "model.norm_eps", default=1e-5, kind=float),
        Choice("use_qk_norm", "model.qk_norm", {False: "none", True: "head"}, False),
        Choice("attention_bias", "model.attention_bias", {False: "none", True: "qkv"}, False),
        Rotary(partial=0.5),
        DenseFirst(default=1),
        SharedExperts(default=1),
        FurtherTokens(),
        SigmoidRouter(groups=(1, 1), scale=1.0),
    ]
    spellings = {
        "per_expert": LayerNames(experts=swiglu_experts("mlp.experts"), **PARTS),
        "fused": LayerNames(experts=FUSED_SWIGLU, **PARTS),
    }
