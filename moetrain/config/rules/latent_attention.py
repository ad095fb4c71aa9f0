"""Rules about multi-head latent attention (`model.attention=mla`)."""

from collections.abc import Iterator

from moetrain.config.rules.attention import PLAIN_ATTENTION
from moetrain.config.schema import Config
from moetrain.config.values import show
from moetrain.errors import ConfigError

# Options of plain attention that latents do not hold, with the values that are as if there were none.
_HELD = ("attention_bias", "attention_multiplier")
_NOT_HELD = {"partial_rotary_factor": 1.0} | {
    name: none for name, none in PLAIN_ATTENTION.items() if name not in _HELD}


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
                why="latents have norms and channels that turn of their own, and neither sinks nor windows",
                next=f"model.{name}={show(none)}; or model.attention=plain")
