"""Rotary position embedding: pairs of channels of a head turn with the position.

    angle of pair i at position p    a_i(p) = p f_i,   f_i = theta^(-2i/r)
    pair (x, y)                      (x cos a - y sin a,  y cos a + x sin a)

r: channels that turn, the first of a head; the others stay as they are. Pair i is the channels i and i + r/2
(Llama), or 2i and 2i + 1 (interleaved: DeepSeek, and Su et al.).

Scalings change the frequencies, so that a model reads longer texts than it was trained on. L: positions that
it was trained on (`original_max_position_embeddings`), s: `factor`, w_i = 2 pi / f_i: length of a wave.

    linear      f_i / s
    llama3      f_i / s for w_i > L / low_freq_factor, f_i for w_i < L / high_freq_factor, between them
                (1 - m) f_i / s + m f_i  with  m = (L / w_i - low) / (high - low)
    yarn        g f_i / s + (1 - g) f_i,  g: a ramp over i from 0 at the pair that turns beta_fast times in L
                to 1 at that which turns beta_slow times; pair of n turns: r ln(L / 2 pi n) / (2 ln theta).
                `truncate` rounds both ends outwards. cos and sin are multiplied by `attention_factor`, or
                by m(mscale) / m(mscale_all_dim), or by m(1):  m(c) = 0.1 c ln(s) + 1
    longrope    f_i / long_factor_i in a sequence longer than L, f_i / short_factor_i in others. cos and sin
                are multiplied by long_mscale or short_mscale, or by `attention_factor`, or by
                sqrt(1 + ln(s) / ln(L))

Su et al. 2021, "RoFormer"; Chen et al. 2023, "Extending Context Window" (linear); Peng et al. 2023, "YaRN"
(equations 17 to 22); Ding et al. 2024, "LongRoPE"; Llama 3 (2024, arXiv 2407.21783), its released code.

Shapes: S positions, r channels that turn, h head width.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moetrain.config.rope_scaling import with_defaults, yarn_scale


class Rotary(NamedTuple):
    """Cosines and sines of the angles at some positions, for each channel that turns."""

    cos_Sr: Tensor
    sin_Sr: Tensor
    interleaved: bool = False    # whether pairs are neighbors


class RotaryEmbedding:
    """Angles of a model's rotary embedding.

    Args:
        width: r, an even number.
        theta: base of the frequencies.
        interleaved: pairs are neighboring channels, not channels of the two halves.
        scaling: section `model.rope_scaling` of the config; empty for none.
    """

    def __init__(self, *, width: int, theta: float, interleaved: bool = False,
                 scaling: Mapping[str, Any] = {}) -> None:
        self.width, self.theta, self.interleaved = width, theta, interleaved
        self.scaling = with_defaults(scaling)

    def table(self, positions: int, *, dtype: torch.dtype, device: torch.device, first: int = 0) -> Rotary:
        """Compute the cosines and sines, in float64, then cast them.

        Args:
            positions: S.
            dtype: dtype of the results.
            device: device of the results.
            first: the first position; the sequence has `first + positions` of them.

        Returns:
            cos and sin, [S, r] each.
        """
        length = first + positions
        frequencies = self.frequencies(length, device)
        where = torch.arange(first, length, dtype=torch.float64, device=device)
        angles = torch.outer(where, frequencies)
        angles = angles.repeat_interleave(2, 1) if self.interleaved else angles.repeat(1, 2)
        cos, sin, scale = angles.cos(), angles.sin(), self.scale(length)
        if scale != 1:
            cos, sin = cos * scale, sin * scale
        return Rotary(cos.to(dtype), sin.to(dtype), self.interleaved)

    def is_long(self, length: int) -> bool:
        """Whether a sequence of this length takes the second of two tables, for all of its positions."""
        return self.scaling.get("type") == "longrope" and length > self.scaling[
            "original_max_position_embeddings"]

    def frequencies(self, length: int, device: torch.device) -> Tensor:
        """Compute the frequencies of the pairs in a sequence of this length, float64 [r/2]."""
        plain = self.theta ** (-torch.arange(0, self.width, 2, dtype=torch.float64, device=device)
                               / self.width)
        own = self.scaling
        match own.get("type"):
            case "linear":
                return plain / own["factor"]
            case "llama3":
                return _llama3(plain, own)
            case "yarn":
                ramp = _yarn_ramp(self.width, self.theta, own).to(device)
                return ramp * plain / own["factor"] + (1 - ramp) * plain
            case "longrope":
                factors = own["long_factor" if self.is_long(length) else "short_factor"]
                return plain / torch.tensor(factors, dtype=torch.float64, device=device)
        return plain

    def scale(self, length: int) -> float:
        """Compute the factor of cos and sin in a sequence of this length."""
        own = self.scaling
        if own.get("type") not in ("yarn", "longrope"):
            return 1.0
        if own["type"] == "longrope" and own["short_mscale"] is not None:
            return float(own["long_mscale" if self.is_long(length) else "short_mscale"])
        if own["attention_factor"] is not None:
            return float(own["attention_factor"])
        if own["type"] == "longrope":
            longer, original = own["factor"], own["original_max_position_embeddings"]
            return 1.0 if longer <= 1 else math.sqrt(1 + math.log(longer) / math.log(original))
        if own["mscale"] and own["mscale_all_dim"]:
            return yarn_scale(own["factor"], own["mscale"]) / yarn_scale(own["factor"], own["mscale_all_dim"])
        return yarn_scale(own["factor"])


def _llama3(plain: Tensor, own: Mapping[str, Any]) -> Tensor:
    turns = own["original_max_position_embeddings"] * plain / (2 * math.pi)   # in L positions
    low, high = own["low_freq_factor"], own["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * plain / own["factor"] + kept * plain


def _yarn_ramp(width: int, theta: float, own: Mapping[str, Any]) -> Tensor:
    """How much of each frequency is divided by the factor, float64 [r/2] on the host."""
    def pair_of(turns: float) -> float:
        positions = own["original_max_position_embeddings"]
        return width * math.log(positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_of(own["beta_fast"]), pair_of(own["beta_slow"])
    if own["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:                                      # a step instead of a ramp
        high += 0.001
    return ((torch.arange(width // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate the first r channels of x [..., S, h] by the angles of their positions."""
    return _Rotate.apply(x, *rotary)


class _Rotate(torch.autograd.Function):
    """Rotation whose gradient is the rotation by the negative angle, computed by the same few products."""

    @staticmethod
    def forward(ctx, x, cos, sin, interleaved):
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _turn(x, cos, sin, interleaved)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin, ctx.interleaved), None, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    width = cos.shape[-1]
    if width < x.shape[-1]:
        return torch.cat([_turn(x[..., :width], cos, sin, interleaved), x[..., width:]], -1)
    one, other = ((slice(0, None, 2), slice(1, None, 2)) if interleaved else
                  (slice(0, width // 2), slice(width // 2, None)))
    turned = x * cos
    turned[..., one].addcmul_(x[..., other], sin[..., one], value=-1)
    turned[..., other].addcmul_(x[..., one], sin[..., other])
    return turned
