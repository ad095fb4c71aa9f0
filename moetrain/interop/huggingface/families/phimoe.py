"""Phi-3.5-MoE (Microsoft, 2024, arXiv 2404.14219, 2409.12136): LayerNorm, biases, two experts by SparseMixer.

`router_jitter_noise` is the reach of SparseMixer, in evaluation, too. With a LongRoPE scaling, transformers
5 takes the short factors for every length; here the long ones hold behind the original length, as in the
published code.
"""

from moetrain.interop.huggingface.config_rules import Choice, Implied, Rotary, Same, Window
from moetrain.interop.huggingface.families.base import Family, kv_heads, sizes_of
from moetrain.interop.huggingface.families.mixtral import EXPERTS
from moetrain.interop.huggingface.layer_names import FUSED_SWIGLU, LayerNames
from moetrain.interop.huggingface.router_rules import SparseMixer


class Phimoe(Family):
    """Phi-3.5-MoE."""

    model_type = "phimoe"
    architecture = "PhimoeForCausalLM"
    rules = [
        *sizes_of(experts="num_local_experts", expert_dim="intermediate_size"),
        kv_heads(),
        Same("rms_norm_eps", "model.norm_eps", default=1e-5, kind=float),
        Implied({"model.norm": "layer"}),
        Choice("attention_bias", "model.attention_bias", {False: "none", True: "all"}, False),
        Same("lm_head_bias", "model.head_bias", default=False, kind=bool),
        Rotary(theta=1e6),
        Window(),
        SparseMixer(),
    ]
    spellings = {
        "per_expert": LayerNames(router="block_sparse_moe.gate.weight", experts=EXPERTS),
        "fused": LayerNames(router="mlp.router.weight", experts=FUSED_SWIGLU),
    }
