"""Kinds of `model.rope_scaling`, the arguments that each takes, and what of it is a number. No torch.

    linear      all frequencies divided by one factor
    llama3      long waves divided by a factor, short ones not (Llama 3.1)
    yarn        the same with a ramp over the channels, and a scale of cos and sin (YaRN)
    longrope    a factor for every frequency, of which there are two sets (LongRoPE, Phi)

Keys and their meaning are those of `rope_scaling` in Hugging Face's config.json. model/rotary.py computes the
angles.
"""

import math
from collections.abc import Mapping
from typing import Any

from moetrain.config.schema import ModelConfig

_ORIGINAL = "original_max_position_embeddings"
# Arguments by kind: those that must be given, and the others with the value that they have when left out.
REQUIRED: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL),
    "yarn": ("factor", _ORIGINAL),
    "longrope": ("short_factor", "long_factor", _ORIGINAL),
}
OPTIONAL: dict[str, dict[str, Any]] = {
    "linear": {},
    "llama3": {},
    "yarn": {"beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": None, "mscale": None,
             "mscale_all_dim": None, "truncate": True},
    "longrope": {"factor": None, "attention_factor": None, "short_mscale": None, "long_mscale": None},
}


def with_defaults(scaling: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a scaling, `type` included, with those that it leaves out; empty without one.

    An argument that is null is left out.
    """
    if not scaling:
        return {}
    given = {name: value for name, value in scaling.items() if value is not None}
    return {**OPTIONAL[given["type"]], **given}


def rotary_width(sizes: ModelConfig) -> int:
    """Number of channels of a head that the rotary embedding turns."""
    if sizes.attention == "mla":
        return sizes.qk_rope_head_dim
    head = sizes.head_dim or sizes.dim // sizes.num_heads
    return int(head * sizes.partial_rotary_factor)


def yarn_scale(factor: float, mscale: float = 1.0) -> float:
    """Scale of attention under YaRN, 0.1 mscale ln(factor) + 1 (equation 22; mscale: DeepSeek-V2)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def yarn_logit_factor(scaling: Mapping[str, Any]) -> float:
    """Factor of the scaled dot products of latent attention under YaRN: the square of its scale.

    DeepSeek gives this scale by `mscale_all_dim`; queries and keys are only partly rotated, so that a scale
    of cos and sin would not reach all of them. It is 1 for other scalings.
    """
    own = with_defaults(scaling)
    if own.get("type") != "yarn" or not own["mscale_all_dim"]:
        return 1.0
    return yarn_scale(own["factor"], own["mscale_all_dim"]) ** 2
