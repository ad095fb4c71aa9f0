"""Public model families, by the model_type of their `config.json`."""

from moetrain.interop.huggingface.families.registry import FAMILIES

__all__ = ["FAMILIES"]
