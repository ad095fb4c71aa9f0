"""Rules about the text and tokens to train on."""

import codecs
import math
from collections.abc import Iterator
from shlex import quote

from moetrain.config.denoisers import denoiser_of, longest
from moetrain.config.schema import Config, DataConfig
from moetrain.config.suggest import nearest
from moetrain.config.values import show
from moetrain.errors import ConfigError

_UL2 = ("r3_15", "r8_15", "s_25", "x3_50", "x8_50", "x64_15", "x64_50")


def data_path(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Require data.path where no data is built in."""
    place = {"tokens": "<folder written by moetrain data prepare>",
             "megatron": "<prefix of a .bin and .idx, or a folder of them>",
             "memmap": "<a .bin or .npy of token ids, or a folder of them>"}.get(config.data.kind)
    if place and not config.data.path:
        yield ConfigError(
            36, f"data={config.data.kind} without data.path", where="data.path, data.kind",
            why="only text and generated tokens are built in",
            next=f"data.path={place}, or data=text")


def domain_weights(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Refuse weights of domains that are negative or not finite."""
    weights = config.data.weights
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            yield ConfigError(
                170, f"data.weights gives {name} the weight {show(weight)}", where="data.weights",
                why="a weight says how many times as often a domain comes: 0 or more",
                next=quote(f"data.weights={show({**weights, name: 1})}"))
            return


def reading(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Refuse an encoding that Python has not, and a separator or keys that no line can hold."""
    data = config.data
    if not is_text_encoding(data.encoding):
        yield ConfigError(
            130, f"data.encoding={show(data.encoding)} is no encoding of text", where="data.encoding",
            why="Python knows none of this name",
            next="data.encoding=utf-8, or cp1252, utf-16, shift_jis, gb18030 …")
    for name in ("text_key", "domain_key", "separator"):
        value = getattr(data, name)
        if value is not None and not (value.strip() and value.isprintable()):
            yield ConfigError(
                131, f"data.{name}={show(value)} cannot be found in a file", where=f"data.{name}",
                why="it is blank, or has a line break or another character that does not print",
                next=f"data.{name}={show(getattr(DataConfig, name))}")


def denoising(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Check the names and rates of denoisers, and that windows can be corrupted by them."""
    rates, room = config.denoising.rates, config.train.seq_len + 1
    for name, rate in rates.items():
        denoiser = denoiser_of(name)
        if denoiser is None:
            yield ConfigError(
                283, f"denoising.rates names {name}, which is no denoiser", where="denoising.rates",
                why="a name is mode, mean span and percentage: r3_15, x64_50; of mode s without a span: s_25",
                next=f"denoising.rates={show({(nearest(name, _UL2) or _UL2)[0]: rate})}")
        elif not (math.isfinite(rate) and rate > 0):
            yield ConfigError(
                284, f"denoising.rates gives {name} the rate {show(rate)}", where="denoising.rates",
                why="a rate is a share of the windows: above 0",
                next=f"denoising.rates={show({**rates, name: 1})}")
        elif longest(denoiser, room) < 2:
            yield ConfigError(
                285, f"train.seq_len={config.train.seq_len} is too short for {name}",
                where="train.seq_len, denoising.rates",
                why="mode and sentinels leave no room for two tokens of text",
                next="train.seq_len=16 or more")
    if rates and config.data.mask_documents:
        yield ConfigError(
            286, "data.mask_documents=true with denoising.rates",
            where="data.mask_documents, denoising.rates",
            why="corrupted spans stand behind the window, not among the tokens of their document",
            next="data.mask_documents=false, or denoising=none")


def is_text_encoding(name: str) -> bool:
    """Check whether Python can decode a stream of text in it. Codecs from bytes to bytes cannot."""
    try:
        return isinstance(codecs.getincrementaldecoder(name)("replace").decode(b"ab", True), str)
    except (LookupError, TypeError, ValueError, UnicodeError, AssertionError):
        return False
