"""Advice for a large model that would train with the defaults of a small one.

The recipes in conf/experiment/ hold the settings that suit a model of their size; `model=<name>` sets sizes
alone. For a model above LARGE parameters with defaults made for a million parameters, `advice` names the
nearest recipe once.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import replace

from moetrain.config.compose import compose
from moetrain.config.groups import config_dir, group_options
from moetrain.config.schema import Config, ModelConfig
from moetrain.config.size_check import vocabulary_of
from moetrain.config.sizes import count_parameters
from moetrain.config.values import flatten, show
from moetrain.config.yaml_file import load
from moetrain.units import count

LARGE = 10**9
# Keys that a recipe leaves to its user -> what to set them to.
_LEFT_TO_USER = {"data.tokenizer": "a tokenizer.json", "data.path": "your own text"}


def advice(config: Config) -> str | None:
    """Name on one line the recipe, and the settings that suit only a small model; None without any."""
    size = count_parameters(config.model, vocabulary_of(config), config.expert, config.router).total
    if size < LARGE or not (small := dict(_small(config))):
        return None
    recipe = _nearest(size)
    values = flatten(compose([f"experiment={recipe}"]))
    said = [f"{text} ({_LEFT_TO_USER.get(key) or show(values[key])})" for key, text in small.items()]
    return (f"[warn] {count(size)} parameters, and settings for a model of one million: {', '.join(said)}. "
            f"experiment={recipe} sets what stands in brackets, but for text and tokenizer: "
            "docs/howto/recipes.md")


def _small(config: Config) -> Iterator[tuple[str, str]]:
    """Yield (key, setting) for each setting that suits only a model of about a million parameters."""
    run, train, data = config.run, config.train, config.data
    if run.dtype == "float32":
        yield "run.dtype", "run.dtype=float32"
    if train.seq_len <= 128:
        yield "train.seq_len", f"train.seq_len={train.seq_len}"
    if run.steps < 1000:
        yield "run.steps", f"run.steps={run.steps}"
    if data.kind == "text" and data.tokenizer == "bytes":
        yield "data.tokenizer", "data.tokenizer=bytes"
    if data.kind == "text" and data.path is None:
        yield "data.path", "the built-in corpus"


def _nearest(size: int) -> str:
    """Find the recipe whose model is nearest in parameters, by the logarithm of their ratio."""
    found = {}
    for name in group_options()["experiment"]:
        text = (config_dir() / "experiment" / f"{name}.yaml").read_text(encoding="utf-8")
        if chosen := re.search(r"override /model: (\w+)", text):
            values = load(config_dir() / "model" / f"{chosen[1]}.yaml")
            sizes = replace(ModelConfig(), **values.get("model", values))   # of the model alone, or of more
            found[name] = abs(math.log(count_parameters(sizes, 50304).total / size))
    return min(found, key=lambda name: found[name])
