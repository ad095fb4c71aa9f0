"""GPT-OSS (OpenAI, 2025): attention sinks, windows in every second layer, clamped experts with biases.

The experts of a layer are one tensor, input-major, with gate and up columns in turn. The published files hold
them in four bits (`_blocks`, `_scales`), which are converted as they are read.
"""

from collections.abc import Mapping
from typing import Any

from moetrain.interop.huggingface.config_rules import Choice, Implied, Rotary, Same, Window
from moetrain.interop.huggingface.families.base import Family, head_dim, kv_heads, sizes_of
from moetrain.interop.huggingface.layer_names import Fused, LayerNames
from moetrain.interop.huggingface.router_rules import SoftmaxRouter
from moetrain.interop.huggingface.semantics import CLAMPED_SWIGLU

# Of a file that says nothing of the rotary embedding.
SCALING = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
           "original_max_position_embeddings": 4096}


def sliding_layers(theirs: Mapping[str, Any]) -> list[int]:
    """Layers with a window of a file that does not list them: every second, from the first on."""
    return list(range(0, theirs["num_hidden_layers"], 2))


class GptOss(Family):
    """GPT-OSS."""

    model_type = "gpt_oss"
    architecture = "GptOssForCausalLM"
    rules = [
        *sizes_of(experts="num_local_experts", expert_dim="intermediate_size", top_k=("experts_per_token",)),
        kv_heads(), head_dim(64),
        Same("rms_norm_eps", "model.norm_eps", default=1e-5, kind=float),
        Choice("attention_bias", "model.attention_bias", {False: "none", True: "all"}, True),
        Implied({"model.attention_sinks": True, "expert._target_": CLAMPED_SWIGLU,
                 "router.logit_bias": True}),
        Same("swiglu_limit", "expert.limit", default=7.0, kind=float),
        Same("swiglu_alpha", "expert.slope", default=1.702, kind=float),
        Rotary(theta=150000.0, scaling=SCALING),
        Window(layer_types=sliding_layers, default=128),
        SoftmaxRouter(),
    ]
    spellings = {
        "fused": LayerNames(router="mlp.router.weight", router_bias="mlp.router.bias",
                            experts=Fused("mlp.experts.gate_up_proj", "mlp.experts.down_proj",
                                          input_major=True)),
    }
