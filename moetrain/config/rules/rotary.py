"""Rules about the rotary embedding, and about options of the residual stream, which some layers lack."""

from collections.abc import Iterator
from typing import Any

from moetrain.config.rope_scaling import OPTIONAL, REQUIRED, rotary_width
from moetrain.config.schema import Config
from moetrain.config.suggest import nearest
from moetrain.config.values import show
from moetrain.errors import ConfigError

_LISTS = ("short_factor", "long_factor")
# Arguments of which the first must be less than the second.
_ORDERED = (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast"))


def rotary_channels(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Check that the channels of a head that turn are pairs, and at least one."""
    model, width = config.model, rotary_width(config.model)
    if model.partial_rotary_factor == 1 or (model.head_dim is None and model.dim % model.num_heads):
        return
    if model.attention != "mla" and (width < 2 or width % 2):
        head = model.head_dim or model.dim // model.num_heads
        fitting = max(2, width // 2 * 2)
        yield ConfigError(
            296, f"model.partial_rotary_factor={show(model.partial_rotary_factor)} turns {width} of {head} "
                 "channels", where="model.partial_rotary_factor, model.head_dim",
            why="the rotary embedding turns pairs of channels, at least one",
            next=f"model.partial_rotary_factor={fitting / head:.6g}")


def rope_scaling(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Check kind and arguments of model.rope_scaling."""
    given = {name: value for name, value in config.model.rope_scaling.items() if value is not None}
    if not given:
        return
    kind = given.get("type")
    if kind not in REQUIRED:
        what = f"has the type {show(kind)}" if "type" in given else "has no type"
        yield _wrong(what, f"types are {', '.join(REQUIRED)}", "model.rope_scaling.type=yarn")
        return
    known = [*REQUIRED[kind], *OPTIONAL[kind]]
    for name in given:
        if name not in ("type", *known):
            meant = nearest(name, known, count=1)
            yield _wrong(f"has no argument {name}", f"{kind} takes {', '.join(known)}",
                         f"~model.rope_scaling.{name}" + (f"; {meant[0]} may be meant" if meant else ""))
    for name in REQUIRED[kind]:
        if name not in given:
            yield _wrong(f"lacks {name}", f"{kind} needs {', '.join(REQUIRED[kind])}",
                         f"model.rope_scaling.{name}=<value>")
    pairs = rotary_width(config.model) // 2
    for name in known:
        if name in given and (why := _misfit(name, given[name], pairs)):
            yield _wrong(f"has {name}={_short(given[name])}", why, f"model.rope_scaling.{name}=<value>")
            return
    for less, more in _ORDERED:
        low, high = ({**OPTIONAL[kind], **given}.get(name) for name in (less, more))
        if low is not None and high is not None and not low < high:
            yield _wrong(f"has {less}={show(low)} and {more}={show(high)}", f"{less} is less than {more}",
                         f"model.rope_scaling.{more}={show(4 * float(low))}")
    if kind == "longrope":
        yield from _scale_of_longrope(given)


def residual_stream(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Refuse options that a layer does not honor: attention experts have no positions, chains add inside."""
    model = config.model
    turning = {"model.partial_rotary_factor": model.partial_rotary_factor != 1,
               "model.rope_interleaved": model.rope_interleaved,
               "model.rope_scaling": bool(model.rope_scaling)}
    chosen = [name for name, differs in turning.items() if differs]
    if model.attention == "experts" and chosen:
        yield ConfigError(
            297, f"model.attention=experts with {', '.join(chosen)}",
            where=f"model.attention, {', '.join(chosen)}",
            why="stick-breaking attention has no rotary positions", next=f"leave {', '.join(chosen)} out")
    if model.block == "chain" and model.residual_multiplier != 1:
        yield ConfigError(
            298, f"model.block=chain with model.residual_multiplier={show(model.residual_multiplier)}",
            where="model.residual_multiplier, model.block",
            why="a chain adds to the residual stream in every round, which has no factor there",
            next="model.residual_multiplier=1; or model.block=plain")


def _scale_of_longrope(given: dict[str, Any]) -> list[ConfigError]:
    """List the error of a longrope whose cos and sin have no scale, or half of one."""
    both = [name for name in ("short_mscale", "long_mscale") if name in given]
    if len(both) == 1:
        return [_wrong(f"has {both[0]} alone", "short_mscale and long_mscale scale short and long sequences",
                       "give both, or attention_factor")]
    if not both and not {"attention_factor", "factor"} & set(given):
        return [_wrong("lacks factor",
                       "the scale of cos and sin follows from it, where neither attention_factor nor "
                       "short_mscale and long_mscale are given",
                       "model.rope_scaling.factor=<longest text / original_max_position_embeddings>")]
    return []


def _misfit(name: str, value: Any, pairs: int) -> str:
    """Say why a value does not fit its argument; empty where it does."""
    if name in _LISTS:
        return ("" if isinstance(value, list) and len(value) == pairs and all(each > 0 for each in value) else
                f"it has a number above 0 for each of the {pairs} pairs of channels that turn")
    if name == "truncate":
        return "" if isinstance(value, bool) else "it is true or false"
    number = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    return "" if number else "it is a number above 0"


def _short(value: Any) -> str:
    return f"{len(value)} numbers" if isinstance(value, list) and len(value) > 4 else show(value)


def _wrong(what: str, why: str, next: str) -> ConfigError:
    return ConfigError(295, f"model.rope_scaling {what}", where="model.rope_scaling", why=why, next=next)
