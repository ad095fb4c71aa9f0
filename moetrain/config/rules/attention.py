"""Options of plain attention, which other kinds of attention lack, and rules about its windows."""

from collections import Counter
from collections.abc import Iterator

from moetrain.config.layer_pattern import parse_pattern
from moetrain.config.schema import Config
from moetrain.config.values import show
from moetrain.errors import ConfigError

# Options of plain attention, with the values that are as if there were none. Attention experts and slices
# hold none of them, latents two (latent_attention.py).
PLAIN_ATTENTION = {"qk_norm": "none", "clip_qkv": None, "attention_bias": "none", "attention_sinks": False,
                   "sliding_window": None, "attention_multiplier": None}


def sliding_layers(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Check that model.sliding_layers is a pattern or names layers, and that there is a window."""
    model, given = config.model, config.model.sliding_layers
    written, last = f"model.sliding_layers={show(given)}", model.num_layers - 1
    named = given if isinstance(given, list) else []
    outside = [layer for layer in named if not 0 <= layer <= last]
    twice = [layer for layer, times in Counter(named).items() if times > 1]
    pattern = parse_pattern(given) if isinstance(given, str) else None
    if given is not None and model.sliding_window is None:
        yield ConfigError(288, f"{written} without model.sliding_window",
                          where="model.sliding_layers, model.sliding_window",
                          why="the window that these layers would have has no width",
                          next="model.sliding_window=128, or model.sliding_layers=null")
        return
    if isinstance(given, str) and pattern is None:
        wrong, why = f"{written} is no pattern of layers", "every_<n> and every_<n>_from_<layer> are patterns"
    elif outside:
        wrong = f"{written} names layer {outside[0]} of {model.num_layers}"
        why = f"layers are numbered from 0 to {last}"
    elif twice:
        wrong, why = f"{written} names layer {twice[0]} twice", "a layer is named once"
    elif given == [] or (pattern is not None and pattern[1] > last):
        wrong, why = f"no layer has the window of {written}", "model.sliding_window would do nothing"
    else:
        return
    yield ConfigError(288, wrong, where="model.sliding_layers, model.num_layers", why=why,
                      next="model.sliding_layers=every_2_from_0, or null for all layers")
