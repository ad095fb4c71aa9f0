"""Rules about multi-head latent attention (`model.attention=mla`)."""

from collections.abc import Iterator
from typing import Any

from moetrain.config.schema import Config
from moetrain.config.values import show
from moetrain.errors import ConfigError

# Options of plain attention that latents do not hold, with the values that are as if there were none.
_NOT_HELD: dict[str, Any] = {"qk_norm": "none", "clip_qkv": None, "attention_sinks": False,
                             "sliding_window": None, "partial_rotary_factor": 1.0}


def latent_attention(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Check that the channels that turn are pairs, and refuse options that latents do not hold."""
    model = config.model
    if model.attention != "mla":
        return
    if model.qk_rope_head_dim % 2:
        yield ConfigError(
            299, f"model.qk_rope_head_dim={model.qk_rope_head_dim} is an odd number",
            where="model.qk_rope_head_dim", why="the rotary embedding turns pairs of channels",
            next=f"model.qk_rope_head_dim={model.qk_rope_head_dim + 1}")
    for name, none in _NOT_HELD.items():
        value = getattr(model, name)
        if value != none:
            yield ConfigError(
                300, f"model.attention=mla with model.{name}={show(value)}",
                where=f"model.{name}, model.attention",
                why="its queries and keys have norms, and channels that turn, of their own",
                next=f"model.{name}={show(none)}; or model.attention=plain")
