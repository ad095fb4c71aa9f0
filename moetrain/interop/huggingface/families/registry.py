"""All families, by the model_type of their `config.json`."""

from moetrain.interop.huggingface.families.base import Family
from moetrain.interop.huggingface.families.mixtral import Mixtral
from moetrain.interop.huggingface.families.qwen3_moe import Qwen3Moe

FAMILIES: dict[str, Family] = {family.model_type: family for family in (Mixtral(), Qwen3Moe())}
