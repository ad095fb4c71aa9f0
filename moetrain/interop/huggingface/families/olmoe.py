"""OLMoE (Muennighoff et al., 2024, arXiv 2409.02060): 64 small experts, probabilities as weights as they are.

Queries and keys are normalized over all heads together, then clipped to +-clip_qkv, as values are.
"""

from moetrain.interop.huggingface.config_rules import Choice, Implied, Rotary, Same
from moetrain.interop.huggingface.families.base import Family, kv_heads, sizes_of
from moetrain.interop.huggingface.layer_names import FUSED_SWIGLU, LayerNames, swiglu_experts
from moetrain.interop.huggingface.router_rules import SoftmaxRouter


class Olmoe(Family):
    """OLMoE."""

    model_type = "olmoe"
    architecture = "OlmoeForCausalLM"
    rules = [
        *sizes_of(experts="num_experts", expert_dim="intermediate_size"),
        kv_heads(),
        Same("rms_norm_eps", "model.norm_eps", default=1e-5, kind=float),
        Implied({"model.qk_norm": "all"}),
        Same("clip_qkv", "model.clip_qkv", default=None, kind=float),
        Choice("attention_bias", "model.attention_bias", {False: "none", True: "all"}, False),
        Rotary(),
        SoftmaxRouter(normalized=False),
    ]
    spellings = {
        "per_expert": LayerNames(router="mlp.gate.weight", experts=swiglu_experts("mlp.experts")),
        "fused": LayerNames(router="mlp.gate.weight", experts=FUSED_SWIGLU),
    }
