"""Mixtral (Mistral AI, 2024, arXiv 2401.04088): eight experts a layer, two a token, weights that sum to 1.

`router_jitter_noise` changes what router and experts are given in training: `router.jitter_scope=layer`.
"""

from moetrain.interop.huggingface.config_rules import Rotary, Same, Window
from moetrain.interop.huggingface.families.base import Family, head_dim, kv_heads, sizes_of
from moetrain.interop.huggingface.layer_names import FUSED_SWIGLU, LayerNames, PerExpert
from moetrain.interop.huggingface.router_rules import Jitter, SoftmaxRouter

# w1 is the gate, w3 up, w2 down.
EXPERTS = PerExpert(*(f"block_sparse_moe.experts.{{}}.{name}.weight" for name in ("w1", "w3", "w2")))


class Mixtral(Family):
    """Mixtral."""

    model_type = "mixtral"
    architecture = "MixtralForCausalLM"
    rules = [
        *sizes_of(experts="num_local_experts", expert_dim="intermediate_size"),
        kv_heads(), head_dim(),
        Same("rms_norm_eps", "model.norm_eps", default=1e-5, kind=float),
        Rotary(theta=1e6),
        Window(),
        SoftmaxRouter(),
        Jitter(),
    ]
    spellings = {
        "per_expert": LayerNames(router="block_sparse_moe.gate.weight", experts=EXPERTS),
        "fused": LayerNames(router="mlp.gate.weight", experts=FUSED_SWIGLU),
    }
