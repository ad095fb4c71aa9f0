"""All families, by the model_type of their `config.json`."""

from moetrain.interop.huggingface.families.base import Family
from moetrain.interop.huggingface.families.deepseek_v2 import DeepseekV2
from moetrain.interop.huggingface.families.deepseek_v3 import DeepseekV3
from moetrain.interop.huggingface.families.glm4_moe import Glm4Moe
from moetrain.interop.huggingface.families.gpt_oss import GptOss
from moetrain.interop.huggingface.families.granitemoe import Granitemoe
from moetrain.interop.huggingface.families.mixtral import Mixtral
from moetrain.interop.huggingface.families.olmoe import Olmoe
from moetrain.interop.huggingface.families.phimoe import Phimoe
from moetrain.interop.huggingface.families.qwen2_moe import Qwen2Moe
from moetrain.interop.huggingface.families.qwen3_moe import Qwen3Moe

FAMILIES: dict[str, Family] = {family.model_type: family for family in (
    Mixtral(), Qwen3Moe(), Olmoe(), Qwen2Moe(), DeepseekV2(), DeepseekV3(), Glm4Moe(), GptOss(), Phimoe(),
    Granitemoe())}
