"""DeepSeek-V2 and V2-Lite (2024, arXiv 2405.04434): latent attention, groups of experts, shared experts.

The rotary dimensions lie in pairs, so nothing is permuted: `model.rope_interleaved`. Under YaRN the logits of
attention have a factor that follows from `mscale_all_dim` (config/rope_scaling.py).

`norm_topk_prob` is false in all releases. Where it is true, the published code divides by the sum and leaves
out the factor, and transformers ignores it; so it is refused.
"""

from moetrain.interop.huggingface.config_rules import (
    DenseFirst,
    Fixed,
    Implied,
    Rotary,
    Rule,
    SharedExperts,
)
from moetrain.interop.huggingface.families.base import Family, latent_attention, sizes_of
from moetrain.interop.huggingface.layer_names import FUSED_SWIGLU, LayerNames, swiglu_experts
from moetrain.interop.huggingface.router_rules import GroupedSoftmaxRouter

SIZES: list[Rule] = [
    *sizes_of(experts="n_routed_experts", expert_dim="moe_intermediate_size", dense_dim="intermediate_size"),
    *latent_attention(),
    Fixed("rms_norm_eps", 1e-6, "the norms of latents have 1e-6 in all published programs, whatever it is",
          ours={"model.norm_eps": 1e-6}),
]


class DeepseekV2(Family):
    """DeepSeek-V2."""

    model_type = "deepseek_v2"
    architecture = "DeepseekV2ForCausalLM"
    rules = [
        *SIZES,
        Implied({"model.rope_interleaved": True}),
        Rotary(),
        DenseFirst(default=0),
        SharedExperts(default=2),
        Fixed("mlp_bias", False, "dense networks and experts have no biases here"),
        Fixed("norm_topk_prob", False, "published programs do not agree on what true means"),
        Fixed("scoring_func", "softmax", "scores are probabilities in this family"),
        GroupedSoftmaxRouter(),
    ]
    spellings = {
        "per_expert": LayerNames(router="mlp.gate.weight", experts=swiglu_experts("mlp.experts"),
                                 shared="mlp.shared_experts"),
        "fused": LayerNames(router="mlp.gate.weight", experts=FUSED_SWIGLU, shared="mlp.shared_experts"),
    }
