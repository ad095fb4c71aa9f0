"""Rules about what is learned."""

import math
from collections.abc import Iterator
from shlex import quote

from moetrain.config.schema import Config
from moetrain.config.values import show
from moetrain.errors import ConfigError


def data_path(config: Config, ranks: int) -> Iterator[ConfigError]:
    place = {"tokens": "<folder written by moetrain data prepare>",
             "megatron": "<prefix of a .bin and .idx, or a folder of them>"}.get(config.data.kind)
    if place and not config.data.path:
        yield ConfigError(36, f"data={config.data.kind} without data.path", where="data.path, data.kind",
                          why="only text and generated tokens are built in", next=f"data.path={place}, or data=text")


def domain_weights(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Weights are factors: finite, and not negative."""
    weights = config.data.weights
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            yield ConfigError(170, f"data.weights gives {name} the weight {show(weight)}", where="data.weights",
                              why="a weight says how many times as often a domain comes: 0 or more",
                              next=quote(f"data.weights={show({**weights, name: 1})}"))
            return
