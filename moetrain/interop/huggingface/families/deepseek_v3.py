"""DeepSeek-V3 and R1 (2024, arXiv 2412.19437): latent attention, sigmoid scores with a bias of the choice.

Its files hold multi-token-prediction modules as layers behind the last (`num_nextn_predict_layers`).
"""

from moetrain.interop.huggingface.config_rules import DenseFirst, FurtherTokens, Rotary, Same, SharedExperts
from moetrain.interop.huggingface.families.base import Family
from moetrain.interop.huggingface.families.deepseek_v2 import SIZES
from moetrain.interop.huggingface.layer_names import FUSED_SWIGLU, LayerNames, swiglu_experts
from moetrain.interop.huggingface.router_rules import SigmoidRouter

PARTS = {"router": "mlp.gate.weight", "router_bias": "mlp.gate.e_score_correction_bias",
         "shared": "mlp.shared_experts"}


class DeepseekV3(Family):
    """DeepSeek-V3."""

    model_type = "deepseek_v3"
    architecture = "DeepseekV3ForCausalLM"
    predicts_further = True
    rules = [
        *SIZES,
        Same("rope_interleave", "model.rope_interleaved", default=True, kind=bool),
        Rotary(),
        DenseFirst(default=3),
        SharedExperts(default=1),
        FurtherTokens(),
        SigmoidRouter(groups=(8, 4), scale=2.5),
    ]
    spellings = {
        "per_expert": LayerNames(experts=swiglu_experts("mlp.experts"), **PARTS),
        "fused": LayerNames(experts=FUSED_SWIGLU, **PARTS),
    }
